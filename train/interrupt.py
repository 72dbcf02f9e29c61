"""Signals as a request to stop at the end of a step, so that nothing is lost.

SIGTERM is what a machine about to be taken away sends; a while later it is gone. A process that it
stopped ends with EXIT_CODE, which says to whoever started it: start it again, nothing is wrong.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.mesh.sharding import replicated

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again.
EXIT_CODE = 75


class TrainingStoppedError(RuntimeError):
    """Training ended before its last step; what was learned is saved."""


class PreemptedError(TrainingStoppedError):
    """SIGTERM came; the same run again goes on. The command ends with `exit_code`."""

    exit_code = EXIT_CODE


class StopRequest:
    """`came` is the signal that came, None as long as none did. Until `noted` is set there is
    nothing to save, and a signal ends the process at once."""

    came: signal.Signals | None = None
    noted: bool = False

    def begin(self) -> None:
        """From now on there is something to save.

        Raises KeyboardInterrupt for a Ctrl-C that came before and was lost: Python drops what is
        raised within a callback of its garbage collector, of which JAX has one.
        """
        if self.came is not None:
            raise KeyboardInterrupt
        self.noted = True


@contextlib.contextmanager
def stop_on_signals(grace_seconds: float | None = None) -> Iterator[StopRequest]:
    """Within the block SIGTERM and the first Ctrl-C only note the wish, once `noted` is set; a
    second Ctrl-C interrupts at once. Outside the main thread, where Python delivers no signals,
    nothing is changed.

    grace_seconds: this long after SIGTERM the process ends, whatever it is doing.
    """
    request, timers = StopRequest(), []
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and (request.came is not None or not request.noted):
            request.came = signal.SIGINT
            raise KeyboardInterrupt
        if not request.noted:
            logger.warning("stopped by SIGTERM before the first step; run again to go on")
            # No exception: it might be dropped, and JAX taken apart while it compiles crashes.
            os._exit(EXIT_CODE)
        first, request.came = request.came is None, signal.Signals(number)
        if first and number == signal.SIGTERM and grace_seconds is not None:
            timer = threading.Timer(grace_seconds, _give_up, [grace_seconds])
            timer.daemon = True
            timer.start()
            timers.append(timer)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_up(grace_seconds: float) -> None:
    """Ends the process while it may still say so; a save under way counts as never begun."""
    logger.error(
        "SIGTERM came %g seconds ago (train.grace_seconds) and the state is not saved yet; ending "
        "now. Run again to go on from the latest complete checkpoint",
        grace_seconds,
    )
    os._exit(EXIT_CODE)


def make_vote(mesh: Mesh) -> Callable[[StopRequest], Callable[[], int]]:
    """`vote(request)()`: a signal that came to any process, as a number that all of them see
    alike; 0 for none. So all stop behind the same step, whenever their signals came.

    A vote is a program on the devices. Cast before a step is dispatched, it is counted as soon as
    the step before is done, and asking for it then delays nothing.
    """
    if jax.process_count() == 1:
        return lambda request: lambda: int(request.came or 0)
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    highest = jax.jit(jnp.max, in_shardings=place, out_shardings=replicated(mesh))
    placed: dict[int, jax.Array] = {}

    def vote(request: StopRequest) -> Callable[[], int]:
        number = int(request.came or 0)
        if number not in placed:
            ballots = np.full(mesh.size, number, np.int32)
            placed[number] = jax.make_array_from_callback(
                ballots.shape, place, lambda index: ballots[index]
            )
        result = highest(placed[number])
        return lambda: int(result)

    return vote
