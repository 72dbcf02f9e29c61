"""The run folder: who may write into it, and what it says about the run."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.formats.atomic import check_parents
from llama_jax.formats.json_fields import read_json
from llama_jax.paths import to_path
from train.config import RunConfig

# Fields that may differ when a run goes on: they change neither what is learned nor from what,
# only where it is computed and what is written on the way.
_FREE = {
    "output",
    "mesh",
    "compute.loss_chunk_tokens",
    "compute.moe_chunk_tokens",
    "compute.remat",
    "data.cache",
    "data.num_workers",
    "data.prefetch",
    "train.eval_every_steps",
    "train.sample_prompts",
    "train.sample_max_tokens",
    "wandb",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.grace_seconds",
    "train.resume_older",
}

# What is there before the config: all that a run has left which was ended while it began.
_BEFORE = (".lock", "config.json.tmp", "teacher.json")


@dataclass(frozen=True)
class RunDir:
    """The paths in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def stopped(self) -> Path:
        return self.path / "stopped.json"

    @property
    def goodput(self) -> Path:
        return self.path / "goodput.json"

    @property
    def generations(self) -> Path:
        return self.path / "generations.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def run_dir(run: RunConfig) -> RunDir:
    return RunDir(to_path(run.output))


def open_run_dir(run: RunConfig) -> tuple[RunDir, RunConfig]:
    """The folder of this run, checked and not yet written to, and its config with the day that the
    run began, where it noted one.

    Raises ValueError when it holds something else, or a run whose config is another one, and for
    a URL.
    """
    if "://" in run.output:
        raise ValueError(
            f"output is {run.output}; training writes to a local folder. Name one, such as where "
            f"the bucket is mounted, or let `llama-jax launch` mount it on a TPU"
        )
    folder = run_dir(run)
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"output {folder.path} is a file; name a folder")
    check_parents(folder.path)
    if not folder.path.is_dir() or all(path.name in _BEFORE for path in folder.path.iterdir()):
        return folder, run
    if not folder.config.is_file():
        raise ValueError(
            f"output {folder.path} is not empty and holds no run (no config.json); choose another "
            f"folder"
        )
    before = read_json(folder.config)
    run = _begun(run, before)
    changes = differences(before, json.loads(json.dumps(run.to_dict())))
    if changes:
        raise ValueError(
            f"output {folder.path} holds a run with another config, so it cannot be resumed: "
            f"{'; '.join(changes)}. Choose another output, or the config of that run"
            f"{_refused(folder, before)}"
        )
    return folder, run


def _refused(folder: RunDir, before: Any) -> str:
    """What helps where the config that the folder holds would no longer be taken: it was written
    when what was without effect was not yet refused."""
    try:
        RunConfig.from_dict(before)
    except ValueError as error:
        return (
            f". That one is refused by now: {error}. If what it names had no effect, write into "
            f"{folder.config} what the config says now, and the run goes on"
        )
    return ""


def _begun(run: RunConfig, before: Any) -> RunConfig:
    data = before.get("data") if isinstance(before, dict) else None
    day = data.get("template_date") if isinstance(data, dict) else None
    if run.data.template_date is not None or not isinstance(day, str):
        return run
    return run.replace(data=run.data.replace(template_date=day))


def differences(
    before: Any,
    now: Any,
    path: str = "",
    *,
    free: Collection[str] = _FREE,
    said: str = "{} was {!r} and is {!r}",
) -> list[str]:
    """`train.steps was 10 and is 20` for each field that must not change and did."""
    if path in free:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            inner = f"{path}.{key}" if path else key
            found += differences(before.get(key), now.get(key), inner, free=free, said=said)
        return found
    return [] if before == now else [said.format(path, before, now)]


def write_config(folder: RunDir, run: RunConfig) -> None:
    """The resolved config, whole or not at all."""
    folder.path.mkdir(parents=True, exist_ok=True)
    temporary = folder.config.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(run.to_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder.config)
