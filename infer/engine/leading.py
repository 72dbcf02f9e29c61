"""The runner of an engine over several hosts: in process 0 it tells the others what it runs, and
`follow` is what they do."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from infer.batch import Runnable
from infer.engine.adapters import Factors
from infer.engine.hosts import LOST_SECONDS, Followers, HostLostError, Leader
from infer.engine.options import EngineOptions
from infer.engine.paged_runner import PagedRunner
from infer.engine.plan import Plan
from infer.sampling import Needs, Rows, Sampled


class LeadingRunner(PagedRunner):
    """Each method that begins steps on the devices is an order to the others first."""

    def __init__(
        self,
        model: Runnable,
        options: EngineOptions,
        *,
        capacity: int,
        num_blocks: int,
        followers: Followers,
    ):
        super().__init__(model, options, capacity=capacity, num_blocks=num_blocks)
        self._followers = followers
        self._is_told = False

    @contextlib.contextmanager
    def _together(self, order: str, *arguments: Any) -> Iterator[None]:
        """What is begun inside follows from the order, and is not told by itself."""
        if self._is_told:
            yield
            return
        self._followers.tell(order, arguments)
        self._is_told = True
        try:
            yield
        finally:
            self._is_told = False

    def put_adapter(self, place: int, factors: Factors) -> None:
        with self._together("put_adapter", place, factors):
            super().put_adapter(place, factors)

    def take_adapter(self, place: int) -> None:
        with self._together("take_adapter", place):
            super().take_adapter(place)

    def take_adapters(self) -> None:
        with self._together("take_adapters"):
            super().take_adapters()

    def reset(self) -> None:
        with self._together("reset"):
            super().reset()

    def warm_up(self) -> None:
        with self._together("warm_up"):
            super().warm_up()

    def drop_inexact_shapes(self) -> None:
        with self._together("drop_inexact_shapes"):
            super().drop_inexact_shapes()

    def read(
        self,
        slot: int,
        blocks: Sequence[int],
        tokens: Sequence[int],
        begin: int,
        shape: int,
        adapter: int = -1,
    ) -> np.ndarray:
        with self._together("read", slot, blocks, tokens, begin, shape, adapter):
            return super().read(slot, blocks, tokens, begin, shape, adapter)

    def score(self, following: Sequence[int]) -> list[np.ndarray]:
        with self._together("score", following):
            return super().score(following)

    def run_first(
        self, place: int, memory: int, mask: np.ndarray | None, columns: Rows, needs: Needs
    ) -> Sampled:
        with self._together("run_first", place, memory, mask, columns, needs):
            return super().run_first(place, memory, mask, columns, needs)

    def run(self, plan: Plan) -> Sampled:
        with self._together("run", plan):
            return super().run(plan)

    def move_slot(self, source: int, target: int, with_memory: bool) -> None:
        with self._together("move_slot", source, target, with_memory):
            super().move_slot(source, target, with_memory)

    def remember_tokens(
        self, slot: int, tokens: Sequence[int], num_prompt: int, biases: Mapping[int, float]
    ) -> None:
        with self._together("remember_tokens", slot, tokens, num_prompt, biases):
            super().remember_tokens(slot, tokens, num_prompt, biases)

    def keep(self, number: int, blocks: Sequence[int]) -> None:
        with self._together("keep", number, blocks):
            super().keep(number, blocks)

    def bring_back(self, number: int, blocks: Sequence[int]) -> None:
        with self._together("bring_back", number, blocks):
            super().bring_back(number, blocks)

    def drop(self, number: int) -> None:
        # Where the others are gone, nothing is kept there.
        with contextlib.suppress(HostLostError), self._together("drop", number):
            super().drop(number)


def follow(runner: PagedRunner, leader: Leader) -> None:
    """Does what the leader tells until it ends. Raises HostLostError."""
    orders: dict[str, Callable[..., Any]] = {
        each.__name__: each
        for each in (
            runner.put_adapter,
            runner.take_adapter,
            runner.take_adapters,
            runner.reset,
            runner.warm_up,
            runner.drop_inexact_shapes,
            runner.read,
            runner.score,
            runner.run_first,
            runner.run,
            runner.move_slot,
            runner.remember_tokens,
            runner.keep,
            runner.bring_back,
            runner.drop,
        )
    }
    with runner.model.context():
        for order, arguments in leader.orders():
            try:
                orders[order](*arguments)
            except Exception as error:
                # Any error may come of the loss of process 0: JAX has one for each way to notice.
                if leader.is_gone(LOST_SECONDS):
                    raise HostLostError(f"process 0 of this server is gone: {error}") from error
                raise
