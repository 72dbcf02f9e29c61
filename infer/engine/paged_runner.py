"""A runner whose rows hold pages: a block of the block manager is a page of the cache.

A prefix is shared by holding its pages, and what is saved is there already, so nothing is copied
but what a preempted choice takes to the host. Page 0 is nobody's (`paged_cache.NOWHERE`), block b
is page b + 1, and behind the blocks lie a few pages for trying steps out.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer.batch import Runnable
from infer.engine import paged_steps, placement
from infer.engine.ahead import Call
from infer.engine.options import EngineOptions
from infer.engine.plan import Placed
from infer.engine.runner import Runner
from infer.engine.scheduler import Choice
from llama_jax.kernels.paged import check_tables
from llama_jax.mesh.host_copy import HostCopy
from llama_jax.model.paged_cache import NOWHERE, PageRows

# Pages that go between device and host at a time.
_SWAPPED_PAGES = 8


class PagedRunner(Runner):
    least_tokens = 8  # a TPU multiplies as many in the time of one

    def __init__(self, model: Runnable, options: EngineOptions, *, capacity: int, num_blocks: int):
        super().__init__(model, options, capacity=capacity, num_blocks=num_blocks)
        self.pages_per_row = -(-self.capacity // options.block_size)
        num_scratch = -(-self.shapes.pieces[-1] // options.block_size) + 1
        self.scratch_blocks = range(num_blocks, num_blocks + num_scratch)
        self._parts = 1 if model.mesh is None else placement.check(model.config, model.mesh)
        self._numbers = itertools.count(1)
        self._kept: dict[int, list[Any]] = {}  # pages of preempted choices, as host copies
        if placement.has_kernel(model.mesh):
            check_tables(self.shapes.rows[-1], self.pages_per_row)

    @property
    def num_pages(self) -> int:
        """Of each layer."""
        return 1 + self._num_blocks + len(self.scratch_blocks)

    def num_scratch_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.options.block_size)

    def _allocate(self, num_slots: int) -> None:
        self._kept = {}
        self._cache = None  # the old ones first: there may be no room for both
        self._cache = paged_steps.new_pages(self.model.config, **self.page_options())

    def page_options(self) -> dict[str, Any]:
        """What `paged_steps.new_pages` makes the cache from."""
        return {
            "num_pages": self.num_pages,
            "page_size": self.options.block_size,
            "dtype": self._dtype,
            "kernel": placement.has_kernel(self.model.mesh),
            "parts": self._parts,
            **self._shared,
        }

    def reset(self) -> None:
        """Waits: where there is no room, that shows here."""
        super().reset()
        jax.block_until_ready(self._cache)

    def settle(self, result: Any) -> None:
        """Behind each order of several hosts. On CPUs what is begun next may overtake what runs, if
        it waits for none of its results, and would take its place in what processes send each
        other; other devices do one after the other."""
        if self.model.mesh is not None and self.model.mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready((result, self._cache, self.chooser.memory))

    def _store_calls(self) -> list[Call]:
        return []

    def _warm_up_store(self) -> None:
        self.keep(0, self.scratch_blocks[:1])
        self.bring_back(0, self.scratch_blocks[:1])
        self.move_slot(self.scratch_slot, self.scratch_slot, True)

    def _trial_row(self, slot: int) -> tuple[list[int], Sequence[int]]:
        """All rows hold the same pages, so all take the same token."""
        return [1], self.scratch_blocks

    def _piece_call(
        self, slot: int, blocks: Sequence[int], tokens: np.ndarray, *numbers: np.int32
    ) -> Call:
        return Call(
            paged_steps.read_piece,
            (
                self.model.config,
                self.params,
                self._cache,
                tokens,
                self._table(blocks),
                *numbers,
            ),
            self._shared,
        )

    def _tokens_call(
        self,
        rows: int,
        length: int,
        placed: Mapping[int, Placed],
        adapters: Sequence[int],
    ) -> Call:
        tokens = np.zeros((rows, length), np.int32)
        tables: Any = np.full((rows, self.pages_per_row), NOWHERE, np.int32)
        begins: Any = np.zeros((rows, 1), np.int32)
        ends: Any = np.ones(rows, np.int32)
        for slot, (begin, ids, blocks) in placed.items():
            tokens[slot, : len(ids)] = ids
            tables[slot] = self._table(blocks)
            begins[slot], ends[slot] = begin, begin + len(ids)
        positions = begins + np.arange(length, dtype=np.int32)
        where = tokens, PageRows(tables, positions, ends), np.asarray(adapters, np.int32)
        return Call(
            paged_steps.run_tokens,
            (self.model.config, self.params, self._cache, *where),
            self._shared,
        )

    def _table(self, blocks: Sequence[int]) -> np.ndarray:
        table = np.full(self.pages_per_row, NOWHERE, np.int32)
        table[: len(blocks)] = np.asarray(blocks, np.int32) + 1
        return table

    # Slots and blocks: a slot is a place in a step, and what its row holds are pages.

    def load_blocks(self, slot: int, ids: Sequence[int]) -> None:
        """Nothing to do: the row holds them."""

    def save_blocks(self, slot: int, ids: Sequence[int], begin: int, end: int) -> None:
        """Nothing to do: they were written where they are kept."""

    def clear(self, slot: int) -> None:
        """Nothing to do: no row reads what it has not written."""

    def move_slot(self, source: int, target: int, with_memory: bool) -> None:
        if with_memory:
            self.chooser.copy(source, target)

    def read_out(self, choice: Choice) -> int:
        """The number under which `keep` keeps it."""
        number = next(self._numbers)
        self.keep(number, self._computed(choice))
        return number

    def put_back(self, choice: Choice) -> None:
        self.bring_back(choice.saved, self._computed(choice))
        choice.saved = None
        self.remember(choice)

    def forget(self, choice: Choice) -> None:
        if choice.saved is not None:
            self.drop(choice.saved)
        choice.saved = None

    def _computed(self, choice: Choice) -> Sequence[int]:
        """The blocks that hold something: the newest token has not run."""
        return choice.blocks[: -(-(choice.num_tokens - 1) // self.options.block_size)]

    def keep(self, number: int, blocks: Sequence[int]) -> None:
        """Copies the pages of blocks to the host."""
        self._kept[number] = [
            jax.tree.map(HostCopy.of, paged_steps.read_pages(self._cache, ids))
            for ids in _swapped(blocks)
        ]

    def bring_back(self, number: int, blocks: Sequence[int]) -> None:
        """Puts what was kept into the pages of as many blocks."""
        for ids, part in zip(_swapped(blocks), self._kept.pop(number), strict=True):
            content = jax.tree.map(lambda copy: copy.to_devices(), part)
            self._cache = paged_steps.write_pages(self._cache, ids, content)

    def drop(self, number: int) -> None:
        """What was kept is wanted no more."""
        del self._kept[number]


def _swapped(blocks: Sequence[int]) -> list[np.ndarray]:
    """Their pages, in groups of equal size."""
    groups = []
    for begin in range(0, len(blocks), _SWAPPED_PAGES):
        group = np.full(_SWAPPED_PAGES, NOWHERE, np.int32)
        part = blocks[begin : begin + _SWAPPED_PAGES]
        group[: len(part)] = np.asarray(part, np.int32) + 1
        groups.append(group)
    return groups
