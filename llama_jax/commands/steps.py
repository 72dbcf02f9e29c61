"""The table of a running training: a row a step, the last one rewritten as long as it is the last.

Elsewhere than on a terminal it is plain lines, now and then.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from llama_jax.commands.report import PLAIN_LINE_SECONDS

# So many rows of a run stay; rows with an evaluation stay anyway.
_KEPT_ROWS = 20
# The first step's time has compilation and warming up in it, so the second says how long it takes.
_FEW_STEPS = 2


class Steps:
    """`update(step, total, entry)` with the entry of a step as `metrics.jsonl` has it."""

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ):
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._clock = clock
        self._started: tuple[int, float] | None = None
        self._said = -math.inf
        self._columns: list[str] = []

    def update(self, step: int, total: int, entry: Mapping[str, Any]) -> None:
        now = self._clock()
        cells = self._cells(step, total, entry, now)
        evaluated = "eval_loss" in entry
        if not self._live:
            # Every evaluation, the end, and in between one line in a while.
            if evaluated or step >= total or now - self._said >= PLAIN_LINE_SECONDS:
                self._said = now
                named = [f"{name} {text}" for name, text in cells.items() if name != "step"]
                self._write(f"step {cells['step']}: {', '.join(named)}\n")
            return
        if not self._columns:
            # With what the first step has: whether MFU is known does not change.
            self._columns = [name for name in cells if name != "evaluation loss"]
            self._write(" ".join(f"{name:>{_width(name, total)}}" for name in self._columns) + "\n")
        row = " ".join(f"{cells.get(name, ''):>{_width(name, total)}}" for name in self._columns)
        if evaluated:
            row += f"   evaluation loss {cells['evaluation loss']}"
        stays = evaluated or step >= total or step % max(1, total // _KEPT_ROWS) == 0
        # The rest of the line is erased: the row before may have been longer.
        self._write(f"\r{row}\x1b[K" + ("\n" if stays else ""))

    def _cells(self, step: int, total: int, entry: Mapping[str, Any], now: float) -> dict[str, str]:
        cells = {
            "step": f"{step}/{total}",
            "loss": _number(entry["loss"], ".4f"),
            "learning rate": _number(entry["learning_rate"], ".2e"),
            "gradient norm": _number(entry["grad_norm"], ".2f"),
            "tokens/s": _number(entry["tokens_per_second"], ",.0f"),
        }
        if "mfu" in entry:
            cells["MFU"] = _number(entry["mfu"], ".1%")
        cells["left"] = self._left(step, total, now)
        if "eval_loss" in entry:
            cells["evaluation loss"] = _number(entry["eval_loss"], ".4f")
        return cells

    def _left(self, step: int, total: int, now: float) -> str:
        """By the pace since the first step of this run, evaluations and saves included."""
        if self._started is None:
            self._started = step, now
        first, began = self._started
        if step >= total:
            return duration(0)
        if step - first < _FEW_STEPS:
            return "?"
        return duration((now - began) / (step - first) * (total - step))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _number(value: float | None, form: str) -> str:
    return "none" if value is None or not math.isfinite(value) else format(value, form)


def _width(name: str, total: int) -> int:
    if name == "step":
        return 2 * len(str(total)) + 1
    return max(len(name), 9)


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:25:00`, `2 days 3:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} day{'s' if days > 1 else ''} {hours}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
