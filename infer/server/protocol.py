"""HTTP/1.1 as uvicorn speaks it, with limits that it has no setting for.

- A connection too many is answered 503.
- A request whose line and headers do not arrive in time is answered 408.
- One whose headers are too long is answered 431.
- A client that reads nothing for a while is cut off, so that it holds no memory and no place in
  the engine. The kernel's buffer for each connection is small for the same reason.
- Every such answer is an error object like those of the routes.
"""

import asyncio
import json
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from infer.server.errors import ApiError

# Bytes that the kernel keeps for a client that does not read (Linux doubles the number).
SEND_BUFFER_BYTES = 64 * 1024


class LimitedProtocol(H11Protocol):
    """See the module. A subclass made by `limited_protocol` carries the limits."""

    head_timeout_seconds: float
    write_timeout_seconds: float
    max_connections: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # uvicorn turns its own log of requests on again; it shows addresses with their queries.
        self.access_log = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self.connections) > self.max_connections:
            message = f"{self.max_connections} connections are open, as many as may"
            self._answer(ApiError(503, message, retry_after_seconds=1))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _stopped(self._head_timer)
        self._write_timer = _stopped(self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # IDLE: the head of the next request is not complete. Its clock runs from the first byte.
        if self.conn.their_state is not h11.IDLE:
            self._head_timer = _stopped(self._head_timer)
        elif self._head_timer is None:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout_seconds, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_timer = _stopped(self._write_timer)

    def send_400_response(self, msg: str) -> None:
        """Called by the parent while it handles what h11 found wrong."""
        error = sys.exc_info()[1]
        hint = getattr(error, "error_status_hint", 400)
        if hint == 431:
            msg = f"the headers are over {self.config.h11_max_incomplete_event_size} bytes"
        elif isinstance(error, h11.RemoteProtocolError):
            msg = f"the request is not HTTP/1.1: {error}"
        self._answer(ApiError(431 if hint == 431 else 400, msg))

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            seconds = self.head_timeout_seconds
            self._answer(ApiError(408, f"no whole request within {seconds:g} seconds"))

    def _answer(self, error: ApiError) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = json.dumps(error.to_json()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *((name.encode(), value.encode()) for name, value in error.headers.items()),
        ]
        response = h11.Response(
            status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status]
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _cut(self) -> None:
        self._write_timer = None
        self.logger.warning("a client read nothing for too long and was cut off")
        self.transport.abort()


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer any more."""
    if timer is not None:
        timer.cancel()
    return None


def limited_protocol(
    *, head_timeout_seconds: float, write_timeout_seconds: float, max_connections: int
) -> type[LimitedProtocol]:
    return type(
        "Protocol",
        (LimitedProtocol,),
        {
            "head_timeout_seconds": head_timeout_seconds,
            "write_timeout_seconds": write_timeout_seconds,
            "max_connections": max_connections,
        },
    )
