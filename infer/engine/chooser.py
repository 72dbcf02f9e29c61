"""Chooses tokens from logits on the device, and holds what that needs: the rules of the model, and
what slots remember of their tokens where those edit logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from infer.batch import Runnable
from infer.engine import steps
from infer.engine.ahead import Call
from infer.engine.columns import filling_columns
from infer.engine.scheduler import Choice
from infer.sampling import Needs, Rows, Sampled
from llama_jax.mesh.sharding import replicated


class Chooser:
    """capacity: tokens that a slot can have.

    nowhere: the slot of rows that remember nothing: it reads what the last slot has, and what is
    counted there is dropped.
    """

    def __init__(self, model: Runnable, *, num_slots: int, capacity: int):
        self._model, self._capacity = model, capacity
        self._vocab_size = model.config.vocab_size
        self._words = -(-self._vocab_size // 32)
        self.nowhere = num_slots
        self.memory: Any = None

    def reset(self) -> None:
        """Slots remember nothing."""
        memory = steps.new_memory(num_slots=self.nowhere, vocab_size=self._vocab_size)
        self.memory, self._rules = _everywhere((memory, self._model.rules), self._model.mesh)

    # Tokens

    def take(
        self,
        logits: jax.Array,
        slots: Sequence[int],
        masks: np.ndarray | None,
        columns: Rows,
        taken: Sequence[int],
        needs: Needs,
    ) -> Sampled:
        """A token from each row of logits; see `steps.take`. Does not wait."""
        call = self.take_call(logits, slots, masks, columns, taken, needs)
        sampled, memory = call.run()
        if memory is not None:
            self.memory = memory
        return sampled

    def take_call(
        self,
        logits: jax.Array,
        slots: Sequence[int],
        masks: np.ndarray | None,
        columns: Rows,
        taken: Sequence[int],
        needs: Needs,
    ) -> Call:
        if needs.edit and masks is None:
            masks = self.no_masks(len(slots))
        arguments = (
            logits,
            self.memory if needs.edit else None,
            np.asarray(slots, np.int32),
            masks if needs.edit else None,
            columns,
            self._rules,
            np.asarray(taken, np.int32),
        )
        return Call(steps.take, arguments, {"needs": needs})

    def no_masks(self, count: int) -> np.ndarray:
        """Masks that allow every token."""
        return np.full((count, self._words), 2**32 - 1, np.uint32)

    def idle(self, logits: jax.Array, needs: Needs) -> tuple[Any, ...]:
        """Arguments of `take` for choices that are nobody's."""
        count = len(logits)
        columns = filling_columns(count, self._vocab_size)
        return logits, [self.nowhere] * count, None, columns, [0] * count, needs

    # What slots remember

    def slot_of(self, choice: Choice) -> int:
        """Where it is remembered."""
        assert choice.slot is not None
        return choice.slot if choice.row.params.edits_logits else self.nowhere

    def remember(
        self, slot: int, tokens: Sequence[int], num_prompt: int, biases: Mapping[int, float]
    ) -> None:
        """Begins a slot's memory with a prompt's tokens and those of its answer so far."""
        self.memory = self._remember_call(slot, tokens, num_prompt, biases).run()

    def _remember_call(
        self, slot: int, tokens: Sequence[int], num_prompt: int, biases: Mapping[int, float]
    ) -> Call:
        padded = np.zeros(self._capacity, np.int32)
        padded[: len(tokens)] = tokens
        bias = np.zeros(self._vocab_size, np.float32)
        for token, value in biases.items():
            bias[token] = -np.inf if value <= -100 else value
        counts = np.int32(num_prompt), np.int32(len(tokens))
        return Call(steps.remember, (self.memory, np.int32(slot), padded, *counts, bias))

    def copy(self, source: int, target: int) -> None:
        self.memory = self._copy_call(source, target).run()

    def _copy_call(self, source: int, target: int) -> Call:
        return Call(steps.copy_memory, (self.memory, np.int32(source), np.int32(target)))

    def memory_calls(self, slot: int) -> list[Call]:
        """All that `remember` and `copy` run."""
        return [self._copy_call(slot, slot), self._remember_call(slot, [0], 1, {})]


def _everywhere(arrays: Any, mesh: Mesh | None) -> Any:
    """Whole on every device. Several processes each put it on their own: `device_put` would compare
    what they have, on devices that may be in the middle of something else."""
    if mesh is None or not mesh.is_multi_process:
        return jax.device_put(arrays, None if mesh is None else replicated(mesh))

    def put(array: Any) -> jax.Array:
        whole, place = np.asarray(array), replicated(mesh)
        return jax.make_array_from_callback(whole.shape, place, whole.__getitem__)

    return jax.tree.map(put, arrays)
