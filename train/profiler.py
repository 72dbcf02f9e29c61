"""A trace of some steps, for TensorBoard's profile page or Perfetto."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

# The first steps of a process are slower than all others: caches fill, buffers are first touched.
_WARM_STEPS = 2


@dataclass(frozen=True)
class TracedSteps:
    """Steps first to last, both traced. From `5` (that many, once the run is warm) or `10-15`."""

    first: int
    last: int
    relative: bool = False

    def absolute(self, done: int) -> "TracedSteps":
        """The same in a run of which `done` steps are behind it."""
        if not self.relative:
            return self
        return TracedSteps(self.first + done, self.last + done)


def read_steps(text: str) -> TracedSteps:
    """Raises ValueError for anything but a number of steps, or the first and the last."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or 0)) if match else (0, 0)
    if match and match[2] is None and first >= 1:
        return TracedSteps(_WARM_STEPS + 1, _WARM_STEPS + first, relative=True)
    if not 1 <= first <= last:
        raise ValueError(
            f"--profile {text!r} is neither a number of steps, such as 5, nor the first and the "
            f"last, such as 10-15"
        )
    return TracedSteps(first, last)


@dataclass
class Profiler:
    """Writes the trace of `steps` under `folder`. steps None: does nothing."""

    folder: Path
    steps: TracedSteps | None
    _tracing: bool = field(default=False, init=False)

    def before(self, step: int, running: Any) -> None:
        """To be called before a step is dispatched. running: the step before, if its numbers are
        not read yet; it is waited for, so that the trace begins with this one."""
        if self.steps is not None and step == self.steps.first:
            if running is not None:
                jax.block_until_ready(running.metrics)
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True

    def after(self, step: int, results: Any) -> None:
        """To be called when a step is dispatched, with its results."""
        if self._tracing and self.steps is not None and step >= self.steps.last:
            jax.block_until_ready(results)
            self.stop()

    def stop(self) -> None:
        """Ends a trace that is under way; a run may end before its last traced step."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            logger.info("the trace is in %s; tensorboard --logdir %s", self.folder, self.folder)
