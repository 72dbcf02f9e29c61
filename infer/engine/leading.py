"""The runner of an engine over several hosts in process 0: it tells the others what it runs, and
`following.py` is what they do."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from infer.batch import Runnable
from infer.engine.adapters import Factors
from infer.engine.hosts import LOST_SECONDS, EngineFollowers, HostLostError
from infer.engine.options import EngineOptions
from infer.engine.paged_runner import PagedRunner
from infer.engine.plan import Plan
from infer.engine.trial import InexactError
from infer.sampling import Needs, Rows, Sampled

_Result = TypeVar("_Result")


class LeadingRunner(PagedRunner):
    """Each method that begins steps on the devices is an order to the others first."""

    def __init__(
        self,
        model: Runnable,
        options: EngineOptions,
        *,
        capacity: int,
        num_blocks: int,
        followers: EngineFollowers,
    ):
        super().__init__(model, options, capacity=capacity, num_blocks=num_blocks)
        self._followers = followers
        self._is_told = False

    def _together(self, begin: Callable[..., _Result], *arguments: Any) -> _Result:
        """What is begun inside follows from the order, and is not told by itself."""
        if self._is_told:
            return begin(*arguments)
        with self._followers.told(begin.__name__, *arguments):
            self._is_told = True
            try:
                result = begin(*arguments)
                self.settle(result)
                return result
            finally:
                self._is_told = False

    # The start, in which one process may fail alone

    def reset(self) -> None:
        with self._followers.told("reset"), self._followers.agreement.in_all():
            super().reset()

    def warm_up(self) -> None:
        with self._followers.told("compile_steps"):
            pass  # behind this order others may go on: compiling begins nothing on the devices
        with self._followers.agreement.in_all():
            super().compile_steps()
        self._first_steps(super().warm_up)

    def drop_inexact_shapes(self) -> None:
        self._first_steps(super().drop_inexact_shapes)

    def _first_steps(self, begin: Callable[[], None]) -> None:
        try:
            self._together(begin)
        except InexactError:
            raise
        except Exception as error:
            # Which steps the others have begun is not known.
            reason = self._followers.lost(LOST_SECONDS) or f"an engine did not start: {error}"
            self._followers.give_up(reason)
            raise

    # Steps

    def put_adapter(self, place: int, factors: Factors) -> None:
        self._together(super().put_adapter, place, factors)

    def take_adapter(self, place: int) -> None:
        self._together(super().take_adapter, place)

    def take_adapters(self) -> None:
        self._together(super().take_adapters)

    def begin_read(
        self,
        slot: int,
        blocks: Sequence[int],
        tokens: Sequence[int],
        begin: int,
        shape: int,
        adapter: int,
    ) -> jax.Array:
        return self._together(super().begin_read, slot, blocks, tokens, begin, shape, adapter)

    def begin_score(self, following: Sequence[int]) -> Any:
        return self._together(super().begin_score, following)

    def run_first(
        self, place: int, memory: int, mask: np.ndarray | None, columns: Rows, needs: Needs
    ) -> Sampled:
        return self._together(super().run_first, place, memory, mask, columns, needs)

    def run(self, plan: Plan) -> Sampled:
        return self._together(super().run, plan)

    def move_slot(self, source: int, target: int, with_memory: bool) -> None:
        self._together(super().move_slot, source, target, with_memory)

    def remember_tokens(
        self, slot: int, tokens: Sequence[int], num_prompt: int, biases: Mapping[int, float]
    ) -> None:
        self._together(super().remember_tokens, slot, tokens, num_prompt, biases)

    def keep(self, number: int, blocks: Sequence[int]) -> None:
        self._together(super().keep, number, blocks)

    def bring_back(self, number: int, blocks: Sequence[int]) -> None:
        self._together(super().bring_back, number, blocks)

    def drop(self, number: int) -> None:
        # Where the others are gone, nothing is kept there.
        with contextlib.suppress(HostLostError):
            self._together(super().drop, number)
