"""A run's numbers in Weights & Biases, for those who have it; the package is not a dependency."""

import hashlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from train.sections.wandb import WandbSection


def check_installed(section: WandbSection | None) -> None:
    """Raises ValueError where the config wants it and it is not there, before anything starts."""
    if section is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "the config has a section wandb, but the package is not installed: pip install "
            "'llama-jax[wandb]', or remove the section"
        )


class WandbRun:
    """One run there for one run folder: a run that goes on here goes on there."""

    def __init__(self, section: WandbSection, run_dir: Path, config: Mapping[str, Any]):
        import wandb

        place = str(run_dir if "://" in str(run_dir) else run_dir.resolve())
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            name=section.name or run_dir.name,
            id=hashlib.sha256(place.encode()).hexdigest()[:16],
            resume="allow",
            mode=section.mode,
            dir=str(run_dir),
            config=dict(config),
        )

    def write(self, entry: Mapping[str, Any]) -> None:
        numbers = {
            name: value
            for name, value in entry.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._run.log(numbers, step=entry["step"])

    def summarize(self, facts: Mapping[str, Any]) -> None:
        """What stands beside the curves at the end."""
        self._run.summary.update(dict(facts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        # Failed runs are marked as such there.
        self._run.finish(exit_code=0 if kind is None else 1)
