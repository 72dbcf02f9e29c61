"""The checkpoints of a run: folders named by their step."""

import itertools
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from llama_jax.formats.checkpoint_files import (
    MARKER,
    DamagedCheckpointError,
    missing_marker,
    verify_together,
)
from llama_jax.mesh.distributed import run_on_main

logger = logging.getLogger(__name__)

_looks = itertools.count()

_STEP = re.compile(r"step_(\d{8,})")
# What the names of unfinished folders have behind that of the step; see `atomic_folder`.
TEMPORARY = ".tmp-"


def step_folder(root: str | Path, step: int) -> Path:
    return Path(root) / f"step_{step:08d}"


def list_steps(root: str | Path, *, marked: bool = True) -> list[int]:
    """The steps with a checkpoint under `root`, oldest first. Folders without the marker of a
    finished save do not count; with `marked=False` only they do."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir() and (path / MARKER).is_file() == marked:
            found.append(int(match.group(1)))
    return sorted(found)


def latest_step(root: str | Path) -> int | None:
    steps = list_steps(root)
    return steps[-1] if steps else None


def find_newest(root: str | Path, *, allow_older: bool) -> tuple[Path, dict[str, Any]] | None:
    """(folder, description) of the checkpoint to go on from, every byte checked; None where there
    is none. What interrupted saves left is removed.

    A damaged checkpoint is an error, unless `allow_older`: then it is set aside, never deleted, and
    the newest good one is taken. Every process of a run calls this alike.

    Raises DamagedCheckpointError, and CheckpointError for a newest folder without its marker.
    """
    root = Path(root)

    def look() -> tuple[list[int], list[int]]:
        remove_unfinished(root)
        return list_steps(root), list_steps(root, marked=False)

    steps, unmarked = run_on_main("list checkpoints", look)
    if unmarked and (not steps or unmarked[-1] > steps[-1]):
        raise missing_marker(step_folder(root, unmarked[-1]))
    problems: list[str] = []
    for step in reversed(steps):
        folder = step_folder(root, step)
        try:
            manifest = verify_together(folder, f"verify newest/{next(_looks)}")
        except DamagedCheckpointError as error:
            if not allow_older:
                raise
            problems.append(str(error))
            continue
        _set_aside_all(root, steps[steps.index(step) + 1 :], problems)
        return folder, manifest
    if problems:
        raise DamagedCheckpointError(f"no checkpoint is whole: {'; '.join(problems)}")
    return None


def _set_aside_all(root: Path, steps: list[int], problems: list[str]) -> None:
    names = run_on_main("set aside", lambda: [set_aside(root, step).name for step in steps])
    for aside, problem in zip(names, reversed(problems), strict=True):
        logger.warning("%s; renamed to %s", problem, aside)


def remove_unfinished(root: str | Path) -> None:
    """Deletes what interrupted saves left under `root`: only folders with their temporary name."""
    if Path(root).is_dir():
        for path in Path(root).glob(f".step_*{TEMPORARY}*"):
            logger.warning("removing %s, which an interrupted save left", path)
            shutil.rmtree(path)


def set_aside(root: str | Path, step: int) -> Path:
    """Renames a damaged checkpoint so that it is no longer found; nothing is deleted."""
    folder = step_folder(root, step)
    number = 0
    while (aside := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    return folder.rename(aside)
