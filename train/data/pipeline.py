"""The order of rows: a Grain pipeline whose place can be saved and found again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from llama_jax.model.losses import Batch
from train.data.packing import first_fit
from train.data.samples import Samples, make_row, stack_rows


@dataclass(frozen=True)
class RowPlan:
    """Which samples lie in which row; every row is made of whole samples."""

    samples: Samples
    groups: Sequence[Sequence[int]]
    sequence_length: int
    pad_token_id: int

    def row(self, number: int) -> Batch:
        members = [self.samples[i] for i in self.groups[number]]
        return make_row(members, self.sequence_length, pad_token_id=self.pad_token_id)


def plan_rows(
    samples: Samples, *, sequence_length: int, packing: bool, pad_token_id: int
) -> RowPlan:
    """One sample a row, or with `packing` as many as fit."""
    if packing:
        groups = first_fit(samples.lengths.tolist(), sequence_length)
    else:
        groups = [[number] for number in range(len(samples))]
    return RowPlan(samples, groups, sequence_length, pad_token_id)


class TrainingBatches:
    """Endless batches [B, T]; `samples` are the numbers of the samples in the latest one.

    Every epoch has each row once, in an order decided by the seed and the epoch alone; a batch may
    hold the end of one epoch and the start of the next, so that no row is left over. `get_state`
    says where the iterator stands and `set_state` puts another one there.
    """

    samples: list[int]

    def __init__(self, plan: RowPlan, *, batch_size: int, shuffle: bool, seed: int):
        if not plan.groups:
            raise ValueError("there are no rows to make batches of")
        self._plan = plan
        self.samples = []
        # Only numbers flow through Grain: a row is made when its batch is.
        rows = grain.MapDataset.range(len(plan.groups)).seed(seed)
        if shuffle:
            rows = rows.shuffle()
        batches = rows.repeat().batch(batch_size, drop_remainder=True)
        # Made in this thread: rows cost little, and nothing is read ahead of the saved state.
        reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(batches.to_iter_dataset(reading))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        numbers = [int(number) for number in next(self._iterator)]
        self.samples = [sample for number in numbers for sample in self._plan.groups[number]]
        return stack_rows([self._plan.row(number) for number in numbers])

    def get_state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


def evaluation_batches(plan: RowPlan, *, batch_size: int) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled up with rows of padding."""
    empty = make_row([], plan.sequence_length, pad_token_id=plan.pad_token_id)
    for start in range(0, len(plan.groups), batch_size):
        numbers = range(start, min(start + batch_size, len(plan.groups)))
        rows = [plan.row(number) for number in numbers]
        yield stack_rows(rows + [empty] * (batch_size - len(rows)))


def split_rows(rows: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(training, evaluation) rows: a random part of the given size, the order kept.

    Both parts get at least one row. Raises ValueError when there are not enough for that.
    """
    if len(rows) < 2:
        raise ValueError(
            f"data.eval_fraction needs at least two rows to split, but there are {len(rows)}"
        )
    count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    train = [row for number, row in enumerate(rows) if number not in held_out]
    return train, [row for number, row in enumerate(rows) if number in held_out]
