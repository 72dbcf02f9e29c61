"""Work that holds a thread until the engine has answered."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from infer.server.errors import ApiError

_Result = TypeVar("_Result")


class Pool:
    """A few threads of its own, so that such work never takes those that other requests need, and
    a queue with an end.

    limit: how many may run and wait. what: they are called in the error of one too many.
    """

    def __init__(self, what: str, *, threads: int, limit: int):
        self._what, self._limit = what, limit
        self._pool = ThreadPoolExecutor(threads, what)
        self._lock, self._count = threading.Lock(), 0

    async def run(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Raises ApiError 429 where as many wait as may."""
        with self._lock:
            if self._count >= self._limit:
                raise ApiError(
                    429,
                    f"{self._count} {self._what} wait, as many as may (queue_limit)",
                    code="queue_full",
                    retry_after_seconds=1,
                )
            self._count += 1
        future = self._pool.submit(work, *arguments)
        # Not when nobody waits any more: until then the thread is taken.
        future.add_done_callback(self._leave)
        return await asyncio.wrap_future(future)

    def _leave(self, future: "Future[Any]") -> None:
        with self._lock:
            self._count -= 1
