"""An end of training before its last step: what stopped.json says of it, and what is raised."""

import json
import math
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.interrupt import PreemptedError, TrainingStoppedError
from train.job import RunningStep

# Of the samples of a batch this many are named in a message; `stopped.json` has all.
_NAMED_SAMPLES = 20


@dataclass
class Stop:
    """Why training ends before its last step: a problem, the step that had it and its numbers, or
    a signal. False as long as it goes on."""

    problem: str | None = None
    step: RunningStep | None = None
    entry: dict[str, Any] = field(default_factory=dict)
    signal: int = 0

    def __bool__(self) -> bool:
        return self.problem is not None or bool(self.signal)

    def note(self, problem: str, step: RunningStep, entry: dict[str, Any]) -> None:
        """Of several problems the first is told."""
        if self.problem is None:
            self.problem, self.step, self.entry = problem, step, dict(entry)

    def write(self, path: Path, saved: Path | None) -> None:
        """`path`, which is stopped.json. saved: the checkpoint to go on from."""
        facts: dict[str, Any] = {"saved": str(saved)}
        if self.step is not None:
            facts |= {"reason": "not finite", **_finite(self.entry)}
            facts["samples"] = self.step.samples
        else:
            facts["reason"] = signal.Signals(self.signal).name
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)

    def raise_error(self, saved: Path | None, *, done: bool) -> None:
        """Raises TrainingStoppedError for a problem; for a signal PreemptedError, or
        KeyboardInterrupt, unless the last step is `done`."""
        where = f"The state is saved in {saved}"
        if self.step is not None:
            samples = self.step.samples
            named = ", ".join(str(number) for number in samples[:_NAMED_SAMPLES])
            more = len(samples) - _NAMED_SAMPLES
            raise TrainingStoppedError(
                f"{self.problem}; that update was left out. Its batch holds the samples {named}"
                f"{f' and {more} more' if more > 0 else ''} (all in stopped.json). {where}. Lower "
                f"optimizer.learning_rate, look at the rows of that batch, or run again to go on "
                f"behind it"
            )
        if self.signal and not done:
            if self.signal == signal.SIGINT:
                raise KeyboardInterrupt
            raise PreemptedError(
                f"stopped by {signal.Signals(self.signal).name}. {where}; run again to go on"
            )


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null."""
    return {name: value if math.isfinite(value) else None for name, value in entry.items()}
