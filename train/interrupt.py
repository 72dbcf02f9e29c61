"""Signals as a request to stop at the end of a step, so that nothing is lost."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """`came` is the signal that came, None as long as none did."""

    came: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block SIGTERM (what a machine about to be taken away sends) and the first Ctrl-C
    only note the wish; a second Ctrl-C interrupts at once. Outside the main thread, where Python
    delivers no signals, nothing is changed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if request.came is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.came = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
