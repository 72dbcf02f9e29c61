"""The order of rows: a Grain pipeline whose place can be saved and found again.

Everything that decides which rows a batch holds is arithmetic on the batch's number: the mixture
says which source an item is from, a shuffle keyed by seed and epoch says which of the source's
rows it is. So a place is one number, the same in every process, and reading ahead cannot lose it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np

from llama_jax.model.losses import Batch
from train.data.mixture import Mixture
from train.data.packing import Groups, pack
from train.data.preference import with_reference
from train.data.samples import Samples, make_row, stack_rows
from train.data.taught import Taught

# Grain wants a length; no run comes near it.
_ENDLESS = 2**48


@dataclass(frozen=True)
class Share:
    """Part of a plan's rows that batches draw from by itself: a source, or all of them together.

    first and count: its items; weight: its share of the items of batches, relative to the others'.
    """

    name: str
    first: int
    count: int
    weight: float


@dataclass(frozen=True)
class RowPlan:
    """Which samples lie in which row; every row is made of whole samples.

    rows_per_item: how many rows in succession go together into a batch: one, or two for pairs.
    reference: [samples] float32, log-probabilities that the batches of pairs carry; None: they
    carry none. It needs one sample a row. taught: a teacher's outputs that batches carry.
    """

    samples: Samples
    groups: Groups
    shares: tuple[Share, ...]
    sequence_length: int
    pad_token_id: int
    rows_per_item: int = 1
    reference: np.ndarray | None = None
    taught: Taught | None = None

    @property
    def num_items(self) -> int:
        return len(self.groups) // self.rows_per_item

    def item_rows(self, item: int) -> range:
        return range(item * self.rows_per_item, (item + 1) * self.rows_per_item)

    def row(self, number: int) -> Batch:
        members = [self.samples[i] for i in self.groups[number]]
        return make_row(members, self.sequence_length, pad_token_id=self.pad_token_id)

    def batch(self, rows: Sequence[int], size: int) -> Batch:
        """The rows [size, T], filled up with rows of padding."""
        made = [self.row(number) for number in rows]
        if len(made) < size:
            empty = make_row([], self.sequence_length, pad_token_id=self.pad_token_id)
            made += [empty] * (size - len(made))
        batch = stack_rows(made)
        if self.taught is not None:
            return self.taught.of(batch, list(rows))
        if self.reference is None:
            return batch
        values = np.zeros(size, np.float32)
        values[: len(rows)] = [self.reference[self.groups[number][0]] for number in rows]
        return with_reference(batch, values)

    @cached_property
    def fingerprint(self) -> str:
        """Of the samples and how they are arranged into rows."""
        digest = hashlib.sha256(self.samples.fingerprint.encode())
        for array in (self.groups.members, self.groups.ends):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        shares = [(share.first, share.count, share.weight) for share in self.shares]
        shape = (self.sequence_length, self.pad_token_id, self.rows_per_item)
        digest.update(repr((shares, shape)).encode())
        return digest.hexdigest()


def plan_rows(
    samples: Samples,
    *,
    sequence_length: int,
    packing: bool,
    pad_token_id: int,
    parts: Sequence[tuple[str, int, float]] | None = None,
    rows_per_item: int = 1,
) -> RowPlan:
    """One sample a row, or with `packing` as many as fit.

    parts: (name, number of samples, weight) of the sources whose shares of batches are set by
    weight; their samples share no row. None: all samples are one lot.
    """
    groups, shares, first, row = [], [], 0, 0
    for name, count, weight in parts or [("all", len(samples), 1.0)]:
        if packing:
            lengths = samples.lengths[first : first + count]
            groups.append(pack(lengths, sequence_length, first=first))
        else:
            groups.append(Groups.one_each(first, first + count))
        rows = len(groups[-1])
        shares.append(Share(name, row // rows_per_item, rows // rows_per_item, weight))
        first, row = first + count, row + rows
    return RowPlan(
        samples,
        Groups.joined(groups),
        tuple(shares),
        sequence_length,
        pad_token_id,
        rows_per_item,
    )


class TrainingBatches:
    """Endless batches of `batch_size` items; `samples` are the numbers of the samples in the
    latest one.

    Every epoch of a share has each of its items once, in an order decided by the seed and the
    epoch alone; a batch may hold the end of one epoch and the start of the next, so that no row is
    left over. `get_state` says where the iterator stands and `set_state` puts another one there.

    With several processes each gets its rows of the same global batch: process p of P has rows
    [p * B / P, (p + 1) * B / P), while `samples` and the state are those of the whole batch.

    prefetch: batches that threads make ahead; the state is that of the batch last handed out.
    evaluation: the fingerprint of the evaluation rows, which must be the same where a run goes on.
    """

    samples: list[int]

    def __init__(
        self,
        plan: RowPlan,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 0,
        num_workers: int = 1,
        evaluation: str | None = None,
    ):
        empty = [share.name for share in plan.shares if not share.count]
        if not plan.num_items or empty:
            raise ValueError(f"there are no rows to make batches of{_named(empty)}")
        self._plan, self._batch_size, self._evaluation = plan, batch_size, evaluation
        self._part = process_part(batch_size, process_index, process_count)
        self._mixture = Mixture([share.weight for share in plan.shares])
        # Only numbers flow through Grain: a row is made when its batch is.
        self._orders = []
        for number, share in enumerate(plan.shares):
            order = grain.MapDataset.range(share.first, share.first + share.count)
            order = order.seed((seed + number) % 2**32)
            self._orders.append((order.shuffle() if shuffle else order).repeat())
        self._reading = grain.ReadOptions(
            num_threads=num_workers if prefetch else 0, prefetch_buffer_size=prefetch
        )
        self._start_at(0)

    def _start_at(self, batch: int) -> None:
        self._done = batch
        self.samples = []
        made = grain.MapDataset.range(batch, _ENDLESS).map(self._make)
        self._iterator = iter(made.to_iter_dataset(self._reading))

    def _items(self, batch: int) -> list[int]:
        items = []
        for number in range(batch * self._batch_size, (batch + 1) * self._batch_size):
            share, place = self._mixture.locate(number)
            items.append(int(self._orders[share][place]))
        return items

    def _make(self, batch: Any) -> tuple[list[int], Batch]:
        items = self._items(int(batch))
        rows = [row for item in items for row in self._plan.item_rows(item)]
        samples = [sample for row in rows for sample in self._plan.groups[row]]
        mine = [row for item in items[self._part] for row in self._plan.item_rows(item)]
        return samples, self._plan.batch(mine, len(mine))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.samples, batch = next(self._iterator)
        self._done += 1
        return batch

    def set_plan(self, plan: RowPlan) -> None:
        """Goes on, at the same place, with a plan of the same rows that carries more."""
        assert plan.fingerprint == self._plan.fingerprint
        self._plan = plan
        self._start_at(self._done)

    def progress(self) -> dict[str, dict[str, float]]:
        """Of each share: items handed out, and how many times its rows that is."""
        counts = self._mixture.counts(self._done * self._batch_size)
        return {
            share.name: {"items": count, "epochs": count / share.count}
            for share, count in zip(self._plan.shares, counts, strict=True)
        }

    def get_state(self) -> dict[str, Any]:
        return {
            "batches": self._done,
            "fingerprint": self._plan.fingerprint,
            "evaluation": self._evaluation,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of other data, in which the same place means nothing, and
        for one of another form."""
        if {*state, "evaluation"} != {"batches", "fingerprint", "evaluation"}:
            raise ValueError(
                f"the place in the data was saved in a form that this version does not read "
                f"(fields {', '.join(sorted(state))}); start a new run in another output folder"
            )
        if state["fingerprint"] != self._plan.fingerprint:
            raise ValueError(
                "the training data is not that of the run to go on with: its rows, their order, "
                "the tokenizer or the way they are arranged changed. Bring the data back, or "
                "start a new run in another output folder"
            )
        # Older runs did not note what they were evaluated on.
        if state.get("evaluation", self._evaluation) != self._evaluation:
            raise ValueError(
                "the evaluation rows are not those of the run to go on with, so its losses could "
                "not be compared. Bring them back, or start a new run in another output folder"
            )
        self._start_at(state["batches"])


def _named(names: Sequence[str]) -> str:
    return f" in {', '.join(names)}" if names else ""


def process_part(batch_size: int, process_index: int, process_count: int) -> slice:
    """The items of a global batch that belong to one process, next to each other."""
    if batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} cannot be dealt out evenly to {process_count} processes; "
            f"make train.batch_size a multiple of their number"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def evaluation_batches(
    plan: RowPlan, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every item once, in order; the last batch is filled up with rows of padding."""
    part = process_part(batch_size, process_index, process_count)
    size = (part.stop - part.start) * plan.rows_per_item
    for start in range(0, plan.num_items, batch_size):
        items = [item for item in range(start, start + batch_size)[part] if item < plan.num_items]
        yield plan.batch([row for item in items for row in plan.item_rows(item)], size)
