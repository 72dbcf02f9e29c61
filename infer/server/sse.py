"""Server-sent events: one JSON object an event, each written in one piece.

JSON is written in ASCII, so no character is ever split and no separator that only some clients
know (U+2028) ends a line early.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from infer.server.errors import ApiError, unforeseen

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n\n"


class EventStream:
    """An ASGI response that sends what `chunks` gives, and ends with it, with an error event, or
    when the client leaves. close: called at the end, whatever it was."""

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        *,
        headers: dict[str, str],
        close: Callable[[BaseException | None], Any],
    ):
        self._chunks, self._headers, self._close = chunks, headers, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: BaseException | None = None
        try:
            error = await run_while_connected(
                receive, self._send_all(send, scope["visit"].arrival.request_id)
            )
        except BaseException as raised:
            error = raised
            if not isinstance(raised, ClientLeftError):
                raise
        finally:
            await self._close(error)

    async def _send_all(self, send: Send, request_id: str) -> Exception | None:
        """Gives what ended the stream early, which the client has been told."""
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            # Tells nginx and its kin to pass pieces on as they come.
            "x-accel-buffering": "no",
            **self._headers,
        }
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await _write(send, event(chunk), more=True)
        except ApiError as error:
            await _write(send, event(error.to_json()), more=False)
            return error
        except Exception as error:
            logger.error("unexpected", exc_info=error, extra={"request_id": request_id})
            await _write(send, event(unforeseen(request_id).to_json()), more=False)
            return error
        await _write(send, DONE, more=False)
        return None


async def _write(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


class ClientLeftError(Exception):
    """The connection was closed before the answer was done."""


async def run_while_connected(receive: Receive, work: Any) -> Any:
    """The result of `work`, a coroutine, which is cancelled when the client goes away.

    The request's body must have been read: what is received after it is the disconnect.
    Raises ClientLeftError.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError, ApiError):
                    await each


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
