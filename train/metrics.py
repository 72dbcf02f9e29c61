"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and lines for a person."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import tensorboardX

logger = logging.getLogger(__name__)

# update(steps done, steps in all, a note): what the command line shows of a running loop.
Progress = Callable[[int, int, str], None]


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
        self._events = tensorboardX.SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=resume_step + 1, flush_secs=10
        )

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
    """The entries of a metrics.jsonl; a last line that a crash cut off is left out."""
    if not path.is_file():
        return []
    entries = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no line feed after it
                break
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    return entries


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }


class Clock:
    """Times steps; what lies between `lap` and `restart` is not counted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def lap(self, tokens: float) -> dict[str, float]:
        """The time since the last restart, and the tokens it took."""
        seconds = time.perf_counter() - self._start
        return {"step_seconds": seconds, "tokens_per_second": tokens / seconds}


def progress_note(entry: Mapping[str, Any]) -> str:
    loss = entry["loss"]
    shown = "none" if not math.isfinite(loss) else f"{loss:.4f}"
    note = (
        f"loss {shown}, learning rate {entry['learning_rate']:.2e}, gradient norm "
        f"{entry['grad_norm']:.2f}, {entry['tokens_per_second']:.0f} tokens/s"
    )
    if "eval_loss" in entry:
        note += f", evaluation loss {entry['eval_loss']:.4f}"
    return note
