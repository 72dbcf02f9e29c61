"""From the engine's thread to the event loop: many events, one wake-up."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from infer.engine.request import Event

# Events that may wait for one client before it is given up.
MAX_WAITING_EVENTS = 8192


class Waker:
    """Wakes mailboxes of one loop. A step of the engine, which fills many, wakes it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._full: deque[Mailbox] = deque()
        self._is_scheduled = False

    def notify(self, mailbox: "Mailbox") -> None:
        """From any thread."""
        self._full.append(mailbox)
        # The order matters: `_wake` clears the flag before it looks, so nothing is left lying.
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_scheduled = False
        while self._full:
            self._full.popleft().wake()


class Mailbox:
    """Events of one API request, each with the number of the prompt it belongs to."""

    def __init__(self, waker: Waker):
        self._waker = waker
        self._events: deque[tuple[int, Event]] = deque()
        self._arrived = asyncio.Event()
        self.has_overflowed = False

    def receiver(self, prompt: int) -> Callable[[Event], None]:
        """What the engine calls, from its thread."""

        def receive(event: Event) -> None:
            if len(self._events) >= MAX_WAITING_EVENTS:
                self.has_overflowed = True
            else:
                self._events.append((prompt, event))
            self._waker.notify(self)

        return receive

    def wake(self) -> None:
        self._arrived.set()

    async def take(self) -> list[tuple[int, Any]]:
        """Waits for events and gives all there are."""
        await self._arrived.wait()
        self._arrived.clear()
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken
