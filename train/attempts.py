"""Goodput of a whole run: every process that worked on it, and the time when none did."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.formats.json_fields import read_json
from train.goodput import CAUSES, LOOP_CAUSES

# What only a look at the whole run can tell.
RUN_CAUSES: dict[str, str] = {
    **CAUSES,
    "lost": "steps that had to be trained again",
    "down": "no process running",
}


class Attempts:
    """`goodput.json`: each attempt at the run, and what they come to.

    first_step: steps that were done when this process began. now: seconds since 1970.

    An attempt that was killed is known up to the last time it wrote, which is at each checkpoint;
    what came after that counts as `down`.
    """

    def __init__(self, path: Path, *, first_step: int, now: Callable[[], float] = time.time):
        self._path, self._first_step, self._now = path, first_step, now
        earlier = read_json(path).get("attempts") if path.is_file() else []
        if not isinstance(earlier, list) or not all(map(_is_attempt, earlier)):
            raise ValueError(
                f"{path} does not say what the attempts at this run were; move it away to count "
                f"them from now on"
            )
        self._earlier: list[dict[str, Any]] = earlier

    def write(self, summary: Mapping[str, Any], last_step: int) -> dict[str, Any]:
        """Takes in what this process did so far, `Goodput.summary()` and the last step it did.
        Returns what the file then holds."""
        attempts = list(self._earlier)
        # A process that found nothing left to do is no attempt.
        if last_step > self._first_step or not attempts:
            attempts.append(
                {
                    "began": self._now() - summary["wall_seconds"],
                    "first_step": self._first_step,
                    "last_step": last_step,
                    "wall_seconds": summary["wall_seconds"],
                    "seconds": dict(summary["seconds"]),
                }
            )
        whole = {**total(attempts), "attempts": attempts}
        temporary = self._path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(self._path)
        return whole


def _is_attempt(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("seconds"), dict):
        return False
    seconds = value["seconds"]
    numbers = [value.get(name) for name in ("began", "first_step", "last_step", "wall_seconds")]
    numbers += [seconds.get("step"), *seconds.values()]
    return set(seconds) <= set(RUN_CAUSES) and all(isinstance(n, int | float) for n in numbers)


def total(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by cause over all attempts, and the part of them that went into steps that counted.

    `goodput` is of all time since the first attempt began; `loop_goodput` is of the time in loops.
    """
    seconds = dict.fromkeys(RUN_CAUSES, 0.0)
    for number, attempt in enumerate(attempts):
        for cause, spent in attempt["seconds"].items():
            seconds[cause] += spent
        if number + 1 < len(attempts):
            after = attempts[number + 1]
            lost = _lost(attempt, after)
            seconds["step"] -= lost
            seconds["lost"] += lost
            # Clocks of two machines may differ: a start before the end counts as none between.
            gap = after["began"] - attempt["began"] - attempt["wall_seconds"]
            seconds["down"] += max(0.0, gap)
    wall = sum(seconds.values())
    in_loop = sum(seconds[cause] for cause in (*LOOP_CAUSES, "lost"))
    return {
        "wall_seconds": wall,
        "goodput": seconds["step"] / wall if wall else 0.0,
        "loop_goodput": seconds["step"] / in_loop if in_loop else 0.0,
        "seconds": seconds,
    }


def _lost(attempt: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Seconds of steps behind the checkpoint that the next attempt went on from."""
    done = attempt["last_step"] - attempt["first_step"]
    if done <= 0:
        return 0.0
    repeated = min(done, max(0, attempt["last_step"] - after["first_step"]))
    return float(attempt["seconds"]["step"]) * repeated / done
