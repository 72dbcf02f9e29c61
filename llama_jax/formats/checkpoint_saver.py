"""Checkpoints of a run, written while training goes on, and which of them are kept."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats.atomic import atomic_folder
from llama_jax.formats.checkpoint_arrays import ArrayWriter
from llama_jax.formats.checkpoint_files import read_manifest
from llama_jax.formats.checkpoint_steps import TEMPORARY, list_steps, step_folder
from llama_jax.formats.checkpoint_write import describe, write_rest
from llama_jax.mesh.distributed import agreed, all_or_none, is_main, run_on_main


class SaveError(RuntimeError):
    """A checkpoint could not be written."""


@dataclass
class _Save:
    """A save under way. stack: leaving it gives the folder its name, or removes it after an error;
    it is empty but in process 0."""

    step: int
    turn: str
    temporary: Path
    frozen_from: Path | None
    writers: list[ArrayWriter]
    manifest: dict[str, Any]
    stack: contextlib.ExitStack


class Saver:
    """Writes `root/step_…` folders in the background, one at a time.

    mask: which arrays of the parameters are trained. keep: how many of the latest stay; keep_best:
    how many with the lowest score stay besides. Older ones go only when a newer one is complete.

    Frozen arrays are linked to those of an earlier checkpoint instead of written again, but not to
    those of the latest: the two latest share no file, so that one damaged file never costs both.

    Every process of a run has one and calls it alike.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        config: ModelConfig,
        mask: tree.Tree,
        tokenizer: Any,
        keep: int,
        keep_best: int = 0,
    ):
        self._root = Path(root)
        self._config, self._mask, self._tokenizer = config, mask, tokenizer
        self._keep, self._keep_best = keep, keep_best
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[Path]] | None = None
        self._count = 0
        self.last: Path | None = None

    def save(
        self,
        step: int,
        *,
        params: tree.Tree,
        optimizer: tree.Tree,
        extra: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Returns when everything is copied to the host; the arrays may be given away then.

        optimizer: any tree of arrays. extra: values for JSON that come back as they are. score:
        what `keep_best` compares.

        Raises SaveError when the save before this one failed.
        """
        self.wait()
        self._count += 1
        trained, frozen = tree.partition(params, self._mask)
        groups = {
            "trained": tree.flatten_arrays(trained),
            "frozen": tree.flatten_arrays(frozen),
            "optimizer": tree.flatten_arrays(optimizer),
        }
        good = score is not None and math.isfinite(score)
        extra = {**extra, "step": step, "score": score if good else None}
        manifest = describe(self._config, params, groups, extra)
        with contextlib.ExitStack() as stack:
            save = self._begin(step, groups, manifest, stack)
            # From here on the folder is the background's.
            save.stack = stack.pop_all()
        self._running = step, self._pool.submit(self._finish, save)

    def wait(self) -> Path | None:
        """Waits for the save under way; the folder of the latest complete one.

        Raises SaveError when it failed, once.
        """
        if self._running is None:
            return self.last
        (step, running), self._running = self._running, None
        try:
            self.last = running.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise SaveError(
                f"the checkpoint of step {step} could not be written: {error}. The latest "
                f"complete one is {self.last or 'none'}"
            ) from error
        return self.last

    def close(self) -> None:
        """Waits for the save under way, whether it succeeds or not, and ends the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _begin(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Any]],
        manifest: dict[str, Any],
        stack: contextlib.ExitStack,
    ) -> _Save:
        def prepare() -> tuple[str, str | None]:
            temporary = stack.enter_context(atomic_folder(step_folder(self._root, step)))
            source = self._frozen_source() if "frozen" in manifest["groups"] else None
            for name in manifest["groups"]:
                if name != "frozen" or source is None:
                    (temporary / name).mkdir()
            return str(temporary), str(source) if source else None

        where, source = run_on_main("begin a save", prepare)
        temporary = Path(where)
        written = [name for name in manifest["groups"] if name != "frozen" or source is None]
        with all_or_none("copy to the host"):
            writers = [ArrayWriter(temporary / name, groups[name]) for name in written]
        turn = f"save/{self._count}/{step}"
        linked = Path(source) if source else None
        return _Save(step, turn, temporary, linked, writers, manifest, contextlib.ExitStack())

    def _frozen_source(self) -> Path | None:
        """The checkpoint whose frozen files the next one may share."""
        steps = list_steps(self._root)
        # With one checkpoint kept there is nothing to fall back on anyway.
        back = 1 if self._keep == 1 and not self._keep_best else 2
        if len(steps) < back:
            return None
        folder = step_folder(self._root, steps[-back])
        return folder if (folder / "frozen").is_dir() else None

    def _finish(self, save: _Save) -> Path:
        """The rest of a save, in the background."""
        folder = step_folder(self._root, save.step)
        with save.stack:
            with agreed(f"{save.turn}/written"):
                for writer in save.writers:
                    writer.wait()
            with agreed(f"{save.turn}/joined"):
                if is_main():
                    for writer in save.writers:
                        writer.finish()
            for writer in save.writers:
                writer.close()
            write_rest(
                save.temporary,
                save.manifest,
                turn=save.turn,
                tokenizer=self._tokenizer,
                frozen_from=save.frozen_from,
            )
            with agreed(f"{save.turn}/complete"):
                save.stack.close()
                if is_main():
                    self._retire()
        return folder

    def _retire(self) -> None:
        """Deletes what need not be kept."""
        steps = list_steps(self._root)
        kept = set(steps[-self._keep :]) | set(self._best(steps))
        for step in steps:
            if step not in kept:
                remove(step_folder(self._root, step))

    def _best(self, steps: list[int]) -> list[int]:
        if not self._keep_best:
            return []
        scores = {
            step: read_manifest(step_folder(self._root, step))["extra"].get("score")
            for step in steps
        }
        # Of equals the newer one.
        scored = [(score, -step) for step, score in scores.items() if score is not None]
        return [-step for _, step in sorted(scored)[: self._keep_best]]


def remove(folder: Path) -> None:
    """Deletes a checkpoint; interrupted, it is not one any more."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}{TEMPORARY}", dir=folder.parent))
    os.rename(folder, aside)
    shutil.rmtree(aside)
