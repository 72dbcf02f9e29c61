"""Goodput: the part of a run's wall time that went into steps, and where the rest went.

Every moment belongs to exactly one cause, the innermost that is open, so the causes add up to the
wall time to the nanosecond. Nothing is sampled and no time is counted twice.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

# What time is spent on. A device works while Python goes on, so `step` must be left only after
# the step's numbers have been read.
CAUSES: dict[str, str] = {
    "step": "training steps",
    "data": "waiting for the next batch",
    "eval": "evaluation and sample generations",
    "save": "writing checkpoints",
    "report": "writing metrics and the report",
    "loop": "the loop itself",
    "compile": "compiling",
    "resume": "reading weights or a checkpoint",
    "other": "before the loop and after it",
}
# What the loop does once it runs: its own share of steps leaves the start out.
LOOP_CAUSES = ("step", "data", "eval", "save", "report", "loop")


class Goodput:
    """Counts from its making.

    `with goodput.cause("save"): …` charges a block to a cause; blocks may nest, and an inner one
    takes its time from the outer. What no block covers is `other`. For one thread.
    """

    def __init__(self, *, clock: Callable[[], int] = time.monotonic_ns):
        """clock: nanoseconds that never fall."""
        self._clock = clock
        self._spent = dict.fromkeys(CAUSES, 0)
        self._open = ["other"]
        self._last = clock()

    @contextlib.contextmanager
    def cause(self, name: str) -> Iterator[None]:
        """Raises ValueError for a cause that is not one of CAUSES."""
        if name not in CAUSES:
            raise ValueError(f"{name!r} is no cause of time; causes are {', '.join(CAUSES)}")
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self._clock()
        self._spent[self._open[-1]] += now - self._last
        self._last = now

    def summary(self) -> dict[str, Any]:
        """Seconds so far, the open block included.

        `goodput` is the part of the wall time spent in steps, `loop_goodput` the same of the time
        since the loop began; 0 where no time has passed. `seconds` has every cause.
        """
        self._charge()
        wall = sum(self._spent.values())
        in_loop = sum(self._spent[name] for name in LOOP_CAUSES)
        return {
            "wall_seconds": wall / 1e9,
            "goodput": _ratio(self._spent["step"], wall),
            "loop_goodput": _ratio(self._spent["step"], in_loop),
            "seconds": {name: spent / 1e9 for name, spent in self._spent.items()},
        }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
