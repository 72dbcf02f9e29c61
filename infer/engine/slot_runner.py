"""A runner whose rows hold slots, which blocks of prefixes are copied into and out of."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from infer.engine import steps
from infer.engine.ahead import Call
from infer.engine.plan import Placed
from infer.engine.runner import Runner
from infer.engine.scheduler import Choice
from llama_jax.model import slot_cache
from llama_jax.model.cache import NEVER


class SlotRunner(Runner):
    least_tokens = 1

    def num_scratch_blocks(self, num_tokens: int) -> int:
        del num_tokens  # the slot has room for all
        return 0

    def _allocate(self, num_slots: int) -> None:
        """Most of the time goes into memory that is touched first."""
        config = self.model.config
        with ThreadPoolExecutor(2) as pool:
            cache = pool.submit(
                steps.new_cache,
                config,
                num_slots=num_slots,
                capacity=self.capacity,
                dtype=self._dtype,
            )
            self._blocks = steps.new_blocks(
                config,
                num_blocks=self._num_blocks,
                block_size=self.options.block_size,
                dtype=self._dtype,
            )
            self._cache = cache.result()

    def _store_calls(self) -> list[Call]:
        slot = self.scratch_slot
        content = jax.eval_shape(slot_cache.read_slot, self._cache, np.int32(slot))
        return [
            self._save_call(slot, [0], 0, 1),
            self._load_call(slot, [0]),
            self._clear_call(slot),
            self._copy_call(slot, slot),
            self._read_out_call(slot),
            self._write_call(slot, content),
        ]

    def _warm_up_store(self) -> None:
        slot = self.scratch_slot
        self.save_blocks(slot, [0], 0, 1)
        self.load_blocks(slot, [0])
        self.clear(slot)
        self.move_slot(slot, slot, True)
        self._write(slot, self._read_out(slot, 1))

    def _trial_row(self, slot: int) -> tuple[list[int], Sequence[int]]:
        return [(slot + 1) % self.model.config.vocab_size], ()

    def _piece_call(
        self, slot: int, blocks: Sequence[int], tokens: np.ndarray, *numbers: np.int32
    ) -> Call:
        del blocks  # the slot holds it all
        where = tokens, np.int32(slot), *numbers
        return Call(
            steps.read_piece,
            (self.model.config, self.params, self._cache, *where),
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
        positions = np.full((rows, length), NEVER, np.int32)
        visible = 1
        for slot, (begin, ids, _) in placed.items():
            tokens[slot, : len(ids)] = ids
            positions[slot] = np.arange(begin, begin + length)
            visible = max(visible, begin + len(ids))
        where = tokens, positions, np.int32(visible), np.asarray(adapters, np.int32)
        return Call(
            steps.run_tokens,
            (self.model.config, self.params, self._cache, *where),
            self._shared,
        )

    # Slots and blocks

    def load_blocks(self, slot: int, ids: Sequence[int]) -> None:
        self._cache = self._load_call(slot, ids).run()

    def _load_call(self, slot: int, ids: Sequence[int]) -> Call:
        where = np.int32(slot), self._padded(ids), np.int32(len(ids))
        return Call(steps.load_blocks, (self._cache, self._blocks, *where))

    def save_blocks(self, slot: int, ids: Sequence[int], begin: int, end: int) -> None:
        self._blocks = self._save_call(slot, ids, begin, end).run()

    def _save_call(self, slot: int, ids: Sequence[int], begin: int, end: int) -> Call:
        where = np.int32(slot), self._padded(ids), np.int32(begin), np.int32(end)
        return Call(steps.save_blocks, (self._blocks, self._cache, *where))

    def _padded(self, ids: Sequence[int]) -> np.ndarray:
        padded = np.zeros(-(-self.capacity // self.options.block_size), np.int32)
        padded[: len(ids)] = ids
        return padded

    def move_slot(self, source: int, target: int, with_memory: bool) -> None:
        self._cache = self._copy_call(source, target).run()
        if with_memory:
            self.chooser.copy(source, target)

    def _copy_call(self, source: int, target: int) -> Call:
        return Call(steps.copy_slot, (self._cache, np.int32(source), np.int32(target)))

    def read_out(self, choice: Choice) -> Any:
        """Keys and values themselves."""
        assert choice.slot is not None
        return self._read_out(choice.slot, choice.num_tokens - 1)

    def _read_out(self, slot: int, num_tokens: int) -> list[tuple[Any, Any]]:
        """Keys and values of a slot's first positions, on the host."""
        content = jax.device_get(self._read_out_call(slot).run())
        return slot_cache.cut_content(content, num_tokens)

    def _read_out_call(self, slot: int) -> Call:
        return Call(steps.read_slot, (self._cache, np.int32(slot)))

    def put_back(self, choice: Choice) -> None:
        assert choice.slot is not None
        self._write(choice.slot, choice.saved)
        choice.saved = None
        self.remember(choice)

    def forget(self, choice: Choice) -> None:
        choice.saved = None

    def _write(self, slot: int, content: list[tuple[Any, Any]]) -> None:
        whole = slot_cache.fill_content(content, self._cache.capacity)
        self._cache = self._write_call(slot, whole).run()

    def _write_call(self, slot: int, whole: Any) -> Call:
        return Call(steps.write_slot, (self._cache, np.int32(slot), whole))

    def clear(self, slot: int) -> None:
        """Zeros, after numbers that are not finite: those would reach whoever comes next, because
        0 times NaN is NaN."""
        self._cache = self._clear_call(slot).run()

    def _clear_call(self, slot: int) -> Call:
        return Call(steps.clear_slot, (self._cache, np.int32(slot)))
