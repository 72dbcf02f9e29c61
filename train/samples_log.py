"""samples.jsonl: which samples each step was trained on, for whoever asks what a batch held."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from train.entries import read_entries


class SamplesLog:
    """A line {"step": …, "samples": […]} for each step. The numbers count the samples that the
    training rows became, from 0; of several processes the whole batch's.

    Lines of steps behind `resume_step` are dropped: those steps are trained again.
    """

    def __init__(self, path: Path, *, resume_step: int):
        kept = [entry for entry in read_samples(path) if entry["step"] <= resume_step]
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, samples: Sequence[int]) -> None:
        self._file.write(json.dumps({"step": step, "samples": list(samples)}) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The entries of a samples.jsonl; see `read_entries`."""
    return read_entries(path)
