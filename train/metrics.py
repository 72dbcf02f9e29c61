"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and lines for a person."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from llama_jax.mesh.slices import peak_flops
from llama_jax.model.flops import model_flops
from train.entries import read_entries
from train.fit import trained_weights
from train.setup import Setup
from train.tensorboard import scalar_writer

logger = logging.getLogger(__name__)

# update(steps done, steps in all, the step's entry): what the command line shows of a running loop.
Progress = Callable[[int, int, Mapping[str, Any]], None]


class MetricsWriter:
    """One JSON object a line in `metrics.jsonl`, and the same numbers as TensorBoard scalars.

    A number that is not finite is null in JSON, which knows no NaN.
    """

    def __init__(self, run_dir: Path, *, resume_step: int):
        self._path = run_dir / "metrics.jsonl"
        kept = [entry for entry in read_metrics(self._path) if entry["step"] <= resume_step]
        # Steps after the checkpoint are trained again: their lines are written anew.
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        temporary = self._path.with_suffix(".jsonl.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = scalar_writer(run_dir / "tensorboard", purge_step=resume_step + 1)

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")
        self._file.flush()
        for name, value in entry.items():
            if name != "step" and value is not None and math.isfinite(value):
                self._events.add_scalar(name, value, entry["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; see `read_entries`."""
    return read_entries(path)


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }


class Clock:
    """Times steps; what lies between `lap` and `restart` is not counted.

    token_flops: what the mathematics of a token needs; peak_flops: what all devices together could
    do in a second. With both, the model FLOPs utilization is told: of tokens, not of padding.
    """

    def __init__(self, *, token_flops: float | None = None, peak_flops: float | None = None):
        self._token_flops, self._peak_flops = token_flops, peak_flops
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def lap(self, tokens: float) -> dict[str, float]:
        """The time since the last restart, the tokens it took, and what of the peak that is."""
        seconds = time.perf_counter() - self._start
        entry = {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
        if self._token_flops is not None and self._peak_flops is not None:
            entry["mfu"] = self._token_flops * tokens / seconds / self._peak_flops
        return entry


def make_clock(setup: Setup) -> Clock:
    """A clock for the run's steps on its devices; without MFU where their peak is not known."""
    kinds = {device.device_kind for device in setup.mesh.devices.flat}
    peak = peak_flops(kinds.pop()) if len(kinds) == 1 else None
    if peak is None:
        return Clock()
    return Clock(token_flops=token_flops(setup), peak_flops=peak * setup.mesh.size)


def token_flops(setup: Setup) -> float:
    """Operations that a step must do for one token of a full row, nothing counted twice."""
    length = setup.run.train.sequence_length
    trained = trained_weights(setup, setup.config)
    return model_flops(setup.config, tokens=length, length=length, trained=trained) / length
