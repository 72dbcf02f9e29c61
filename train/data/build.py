"""The data of a run: files to samples to rows, with the report of what was made of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from train.config import RunConfig
from train.data.pipeline import RowPlan, TrainingBatches, plan_rows, split_rows
from train.data.render import render_rows
from train.data.report import DataReport
from train.data.samples import Samples
from train.data.sources import Row, read_rows


@dataclass(frozen=True)
class RunData:
    """Rows to train on and rows to evaluate on (None: nothing to), with their reports."""

    train: RowPlan
    train_report: DataReport
    eval: RowPlan | None
    eval_report: DataReport | None

    def batches(self, run: RunConfig) -> TrainingBatches:
        return TrainingBatches(
            self.train,
            batch_size=run.train.batch_size,
            shuffle=run.data.shuffle,
            seed=run.train.seed,
        )


def read_run_rows(run: RunConfig) -> tuple[list[Row], list[Row]]:
    """(training, evaluation) rows, checked; needs neither a tokenizer nor JAX.

    Raises ValueError for a bad row, naming file and line.
    """
    rows, held_out = list(read_rows(run.data.train)), list(read_rows(run.data.eval))
    if run.data.eval_fraction:
        return split_rows(rows, run.data.eval_fraction, run.train.seed)
    return rows, held_out


def build_data(
    run: RunConfig, rows: Iterable[Row], held_out: Sequence[Row], tokenizer: Any
) -> RunData:
    """Rows to samples. Raises ValueError when nothing is left to train on."""
    plan, report = _plan(run, rows, tokenizer, "data.train")
    if not held_out:
        return RunData(plan, report, None, None)
    eval_plan, eval_report = _plan(run, held_out, tokenizer, "the evaluation rows")
    return RunData(plan, report, eval_plan, eval_report)


def _plan(
    run: RunConfig, rows: Iterable[Row], tokenizer: Any, name: str
) -> tuple[RowPlan, DataReport]:
    report = DataReport()
    samples = Samples(
        render_rows(
            rows,
            tokenizer,
            run.data,
            sequence_length=run.train.sequence_length,
            train_all=run.method == "pretrain",
            report=report,
        )
    )
    if not len(samples):
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise ValueError(
            f"{name}: none of {report.rows} rows is left ({reasons}); see "
            f"train.sequence_length, data.long_rows and data.long_texts"
        )
    plan = plan_rows(
        samples,
        sequence_length=run.train.sequence_length,
        packing=run.data.packing,
        pad_token_id=tokenizer.pad_token_id,
    )
    report.packed_rows = len(plan.groups)
    return plan, report
