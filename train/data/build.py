"""The data of a run: sources to samples to rows, with the report of what was made of them."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.data.cache import SampleCache
from train.data.pipeline import RowPlan, TrainingBatches, plan_rows
from train.data.render import render_rows
from train.data.report import DataReport, SourceCount
from train.data.row_set import RowSet
from train.data.samples import Sample, Samples

_TRAIN = "data.train"


@dataclass(frozen=True)
class RunData:
    """Rows to train on and rows to evaluate on (None: nothing to), with their reports."""

    train: RowPlan
    train_report: DataReport
    eval: RowPlan | None
    eval_report: DataReport | None

    def batches(
        self, run: RunConfig, *, process_index: int = 0, process_count: int = 1
    ) -> TrainingBatches:
        return TrainingBatches(
            self.train,
            batch_size=run.train.batch_size,
            shuffle=run.data.shuffle,
            seed=run.train.seed,
            process_index=process_index,
            process_count=process_count,
            prefetch=run.data.prefetch,
            num_workers=run.data.num_workers,
            evaluation=None if self.eval is None else self.eval.fingerprint,
        )


def build_data(run: RunConfig, rows: RowSet, held_out: RowSet, tokenizer: Any) -> RunData:
    """Rows to samples, or those that `data.cache` has. Raises ValueError when nothing is left to
    train on."""
    if run.data.template_date is not None:
        tokenizer = tokenizer.on(date.fromisoformat(run.data.template_date))
    made = _cached(run, rows, held_out, tokenizer)
    plan, report = _plan(run, *made["train"], tokenizer, _TRAIN)
    if "eval" not in made:
        return RunData(plan, report, None, None)
    eval_plan, eval_report = _plan(run, *made["eval"], tokenizer, "the evaluation rows")
    return RunData(plan, report, eval_plan, eval_report)


Made = dict[str, tuple[Samples, DataReport]]


def _cached(run: RunConfig, rows: RowSet, held_out: RowSet, tokenizer: Any) -> Made:
    if run.data.cache is None:
        return _make(run, rows, held_out, tokenizer, None)
    cache = SampleCache(run)
    if not cache.exists():
        folder = cache.new()
        try:
            made = _make(run, rows, held_out, tokenizer, folder)
            cache.keep(folder, tokenizer, {name: report for name, (_, report) in made.items()})
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # gone already where it was kept
    return cache.load(tokenizer)


def _make(
    run: RunConfig, rows: RowSet, held_out: RowSet, tokenizer: Any, folder: Path | None
) -> Made:
    """Samples in memory, or in files under `folder`."""
    made = {}
    for name, part in (("train", rows), ("eval", held_out)):
        if name == "train" or len(part):
            report = DataReport()
            samples = _render(run, part, tokenizer, report)
            held = Samples(samples) if folder is None else Samples.stored(samples, folder / name)
            made[name] = (held, report)
    return made


def _plan(
    run: RunConfig, samples: Samples, report: DataReport, tokenizer: Any, name: str
) -> tuple[RowPlan, DataReport]:
    if not len(samples):
        raise ValueError(_nothing_left(name, report.rows, report))
    weighted = any(count.weight is not None for count in report.sources.values())
    if weighted and name == _TRAIN:
        for source, count in report.sources.items():
            if not count.samples:
                raise ValueError(_nothing_left(f"{name}, {source}", count.rows, report))
    plan = plan_rows(
        samples,
        sequence_length=run.train.sequence_length,
        packing=run.data.packing,
        pad_token_id=tokenizer.pad_token_id,
        parts=[(n, c.samples, c.weight or 0.0) for n, c in report.sources.items()]
        if weighted
        else None,
        rows_per_item=1 if run.dpo is None else 2,
    )
    report.arranged(len(plan.groups), run.train.sequence_length)
    if weighted:
        for share in plan.shares:
            report.sources[share.name].sequences = share.count * plan.rows_per_item
    return plan, report


def _render(run: RunConfig, rows: RowSet, tokenizer: Any, report: DataReport) -> Iterator[Sample]:
    """The samples of all sources in order; the report hears what each gave."""
    for source, name in enumerate(rows.names()):
        rows_before, samples, tokens = report.rows, report.samples, report.tokens
        yield from render_rows(
            rows.read(source),
            tokenizer,
            run.data,
            sequence_length=run.train.sequence_length,
            train_all=run.method == "pretrain",
            report=report,
        )
        report.sources[name] = SourceCount(
            rows=report.rows - rows_before,
            samples=report.samples - samples,
            tokens=report.tokens - tokens,
            weight=rows.weight(source),
        )


def _nothing_left(name: str, rows: int, report: DataReport) -> str:
    if not rows:
        return (
            f"{name}: data.eval_fraction holds out every row, so none is left to train on; lower "
            f"it, add rows, or name rows to evaluate on in data.eval"
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
    return (
        f"{name}: none of {rows} rows is left ({reasons}); see train.sequence_length, "
        f"data.long_rows and data.long_texts"
    )
