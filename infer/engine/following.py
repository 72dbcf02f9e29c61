"""What every process but 0 of several hosts does: the orders of process 0, one after the other."""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from infer.engine.agreement import STUCK_SECONDS, Agreement
from infer.engine.hosts import LEAVE, LOST_SECONDS, HostLostError, Leader
from infer.engine.paged_runner import PagedRunner
from infer.engine.trial import InexactError
from llama_jax.mesh.distributed import EXCHANGE_SECONDS, ProcessError

logger = logging.getLogger(__name__)

# Told by whoever makes engines: it begins one that `Following.build` makes.
BUILD = "build"

# The orders that are methods of a runner.
_METHODS = (
    "put_adapter",
    "take_adapter",
    "take_adapters",
    "warm_up",
    "drop_inexact_shapes",
    "begin_read",
    "begin_score",
    "run_first",
    "run",
    "move_slot",
    "remember_tokens",
    "keep",
    "bring_back",
    "drop",
)


class Following:
    """The parts that this process has in the engines of process 0, by their numbers.

    build: makes an engine's part, given what process 0 tells of it, and agrees with the other
    processes that all could. Where one could not, the engine is nowhere; the others go on.
    """

    def __init__(self, build: Callable[[Agreement, str, str], PagedRunner]):
        self._build = build
        self._runners: dict[int, PagedRunner] = {}
        self._agreements: dict[int, Agreement] = {}

    def run(self, leader: Leader) -> None:
        """Until process 0 ends. Raises HostLostError."""
        for engine, order, arguments in leader.orders():
            try:
                self._do(engine, order, arguments)
            except Exception as error:
                # Any error may come of the loss of process 0: JAX has one for each way to notice.
                if leader.is_gone(LOST_SECONDS):
                    raise HostLostError(f"process 0 of this server is gone: {error}") from error
                raise

    def _do(self, engine: int, order: str, arguments: list[Any]) -> None:
        if order == BUILD:
            self._agreements[engine] = Agreement(f"engine {engine}")
            name, version, apart = arguments
            self._try(engine, lambda: self._make(engine, name, version, apart), apart=apart)
        elif order == LEAVE:
            self._runners.pop(engine, None)
            self._agreements.pop(engine, None)
        elif order in ("reset", "compile_steps"):
            step = getattr(self._runners[engine], order)
            self._try(engine, lambda: self._agreed(engine, step), apart=order == "compile_steps")
        elif order in _METHODS:
            runner = self._runners[engine]
            with runner.model.context():
                self._step(runner, order, arguments)
        else:
            raise ValueError(f"process 0 ordered {order!r}, which is no order of this version")

    def _make(self, engine: int, name: str, version: str, apart: bool) -> None:
        agreement = self._agreements[engine]
        with agreement.in_all(EXCHANGE_SECONDS if apart else STUCK_SECONDS):
            self._runners[engine] = self._build(agreement, name, version)

    def _agreed(self, engine: int, step: Callable[[], None]) -> None:
        with self._agreements[engine].in_all(), self._runners[engine].model.context():
            step()

    def _try(self, engine: int, work: Callable[[], None], *, apart: bool) -> None:
        """Work that may fail. apart: beside the orders that follow; process 0 tells none of this
        engine until all have agreed that it is done."""

        def attempt() -> None:
            try:
                work()
            except ProcessError:
                raise  # what the others do is not known
            except Exception as error:
                # Whatever it is, process 0 has heard of it, and reports it.
                extra = {"engine": engine, "reason": str(error)}
                logger.error("engine left out", extra=extra, exc_info=True)
                self._runners.pop(engine, None)

        if apart:
            threading.Thread(target=attempt, name="build", daemon=True).start()
        else:
            attempt()

    def _step(self, runner: PagedRunner, order: str, arguments: list[Any]) -> None:
        # That comes to all processes alike, and process 0 lets the engine go.
        with contextlib.suppress(InexactError):
            runner.settle(getattr(runner, order)(*arguments))
