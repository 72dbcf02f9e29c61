"""What is said of steps while a run goes on: their numbers, the report, and why it stops."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.attempts import Attempts
from train.data.report import spans
from train.generations import read_generations
from train.job import Job, RunningStep, to_numbers
from train.machine import describe
from train.metrics import Progress, make_clock, read_metrics
from train.records import Records
from train.report import write_report
from train.stop import Stop

logger = logging.getLogger(__name__)


class Reporter:
    """Reads the numbers of steps, and says what is to be said of them where that is done."""

    def __init__(self, job: Job, records: Records | None, progress: Progress | None, *, done: int):
        self._job, self._records, self._progress = job, records, progress
        self._last_step = done
        if records is not None:
            self._attempts = Attempts(job.folder.goodput, first_step=done)
        self.clock = make_clock(job.setup)
        self.stop = Stop()

    def read(self, step: RunningStep) -> dict[str, Any]:
        """Waits for a step; its entry in the metrics. Notes whether to stop."""
        with self._job.goodput.cause("step"):
            entry = {"step": step.number, **to_numbers(step.metrics)}
        entry |= self.clock.lap(entry["tokens"])
        self.clock.restart()
        problem = _count_skipped(self._job, entry)
        if problem is not None:
            self.stop.note(problem, step, entry)
        return entry

    def step(self, step: RunningStep, entry: dict[str, Any]) -> None:
        self._last_step = step.number
        with self._job.goodput.cause("report"):
            if self._records is not None:
                self._records.write(entry, step.samples)
            if self._progress is not None:
                self._progress(step.number, self._job.setup.run.train.steps, entry)

    def generations(self, step: int, texts: Sequence[str] | None) -> None:
        if self._records is not None and texts is not None:
            self._records.write_generations(step, texts)

    def flush(self) -> None:
        with self._job.goodput.cause("report"):
            if self._records is not None:
                self._records.flush()

    def page(self) -> None:
        """report.html, and where the time went."""
        with self._job.goodput.cause("report"):
            if self._records is None:
                return
            goodput = self._attempts.write(self._job.goodput.summary(), self._last_step)
            self._records.summarize(goodput)
            _write_report(self._job, goodput)

    def stopped(self, saved: Path | None) -> None:
        """stopped.json, where training stops before its last step."""
        if self._records is not None and self.stop:
            self.stop.write(self._job.folder.stopped, saved)


def _count_skipped(job: Job, entry: dict[str, Any]) -> str | None:
    """Counts a step without an update; a message when training must stop."""
    if entry.pop("updated"):
        return None
    if entry["trained_tokens"] == 0:
        job.counters["batches_without_trained_tokens"] += 1
        logger.warning("step %d: no token of the batch counts; nothing was updated", entry["step"])
        return None
    job.counters["batches_not_finite"] += 1
    return (
        f"at step {entry['step']} the loss is {entry['loss']} and the gradient norm "
        f"{entry['grad_norm']}"
    )


def _write_report(job: Job, goodput: dict[str, Any]) -> None:
    sample = job.data.train.samples[0]
    data = {
        name: report.to_dict()
        for name, report in (("train", job.data.train_report), ("eval", job.data.eval_report))
        if report is not None
    }
    for name, share in job.batches.progress().items():
        data["train"][f"{name}: trained on"] = (
            f"{share['items']} rows, {share['epochs']:.2f} times all"
        )
    write_report(
        job.folder.report,
        config=job.setup.run.to_dict(),
        metrics=read_metrics(job.folder.metrics),
        data=data,
        sample=spans(sample, job.start.tokenizer),
        counters=dict(job.counters),
        parameters=job.setup.num_parameters(),
        goodput=goodput,
        machine=describe(job.setup.mesh),
        generations=read_generations(job.folder.generations),
    )
