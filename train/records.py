"""What a run writes about its steps while it goes on; of several processes only one does."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from train.config import RunConfig
from train.generations import GenerationsLog
from train.metrics import MetricsWriter
from train.run_dir import RunDir
from train.samples_log import SamplesLog
from train.weights_and_biases import WandbRun


class Records:
    """metrics.jsonl, TensorBoard, samples.jsonl, generations.jsonl, and Weights & Biases where the
    run wants it; up to `resume_step` as they are.

    amended: the line of that step anew, with what it lacked.
    """

    def __init__(
        self,
        folder: RunDir,
        run: RunConfig,
        *,
        resume_step: int,
        amended: Mapping[str, Any] | None = None,
    ):
        self._folder = folder
        self._prompts = run.train.sample_prompts
        kept = resume_step if amended is None else resume_step - 1
        self._metrics = MetricsWriter(folder.path, resume_step=kept)
        self._samples = SamplesLog(folder.samples, resume_step=resume_step)
        self._generations = GenerationsLog(folder.generations, resume_step=resume_step)
        self._wandb: WandbRun | None = None
        if run.wandb is not None:
            self._wandb = WandbRun(run.wandb, folder.path, run.to_dict())
        if amended is not None:
            self._write(amended)

    def write(self, entry: Mapping[str, Any], samples: Sequence[int]) -> None:
        self._write(entry)
        self._samples.write(entry["step"], samples)

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._metrics.write(entry)
        if self._wandb is not None:
            self._wandb.write(entry)

    def write_generations(self, step: int, texts: Sequence[str]) -> None:
        """One text for each of the run's prompts."""
        self._generations.write(step, self._prompts, texts)

    def summarize(self, goodput: Mapping[str, Any]) -> None:
        if self._wandb is not None:
            self._wandb.summarize({name: goodput[name] for name in ("goodput", "wall_seconds")})

    def flush(self) -> None:
        """To the disk: a checkpoint must not outlive what is said of its steps."""
        for path in (self._folder.metrics, self._folder.samples):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._metrics.__exit__(*error)
        self._samples.__exit__(*error)
        if self._wandb is not None:
            self._wandb.__exit__(*error)
