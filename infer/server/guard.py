"""What stands before every route: ids, ceilings, keys, the log line, and errors as objects.

Plain ASGI, so that streams pass through untouched.
"""

import logging
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer.server.auth import Gate
from infer.server.errors import ApiError, unforeseen
from infer.server.generation import Arrival
from infer.server.metrics import Metrics
from infer.server.settings import Settings
from infer.server.tracing import HEADERS

logger = logging.getLogger(__name__)

# What orchestrators ask before they have any key.
OPEN_PATHS = ("/healthz", "/readyz")
# A key in an address ends up in logs of proxies and histories of browsers.
_SECRET_PARAMETER = re.compile(
    rb"(?i)(^|&)([^=&]*(key|token|secret|passw|credential)[^=&]*|auth|authorization)(=|&|$)"
)
TWO_LENGTHS = "two_lengths"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Visit:
    """What the routes of one request may add to its log line, and who asks."""

    arrival: Arrival
    route: str = "none"


class Guard:
    """Wraps the routes."""

    def __init__(self, app: ASGIApp, *, settings: Settings, gate: Gate, metrics: Metrics):
        self._app, self._settings, self._gate, self._metrics = app, settings, gate, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        request_id = _request_id(headers)
        status, has_begun = 500, False

        async def watched(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check(scope, headers, request_id, begin)
            await self._app(scope, receive, watched)
        except ApiError as error:
            if has_begun:
                raise
            await error_response(error, scope["path"])(scope, receive, watched)
        except Exception as error:
            logger.error("unexpected", exc_info=error, extra={"request_id": request_id})
            if has_begun:
                raise
            await error_response(unforeseen(request_id), scope["path"])(scope, receive, watched)
        finally:
            self._note(scope, request_id, status, time.perf_counter() - begin)

    def _check(
        self, scope: Scope, headers: list[tuple[bytes, bytes]], request_id: str, begin: float
    ) -> None:
        size = sum(len(name) + len(value) for name, value in headers)
        size += len(scope["path"]) + len(scope["query_string"])
        if len(headers) > self._settings.max_headers:
            raise ApiError(431, f"over {self._settings.max_headers} headers")
        if size > self._settings.max_header_bytes:
            most = self._settings.max_header_bytes
            raise ApiError(431, f"the address and the headers have {size} bytes, over {most}")
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            # A proxy that believes the other one takes what follows for a request of its own.
            raise ApiError(
                400,
                "content-length and transfer-encoding are both given; send one",
                code=TWO_LENGTHS,
            )
        if _SECRET_PARAMETER.search(unquote_to_bytes(scope["query_string"])):
            raise ApiError(
                400,
                "keys are not taken from the address; send 'Authorization: Bearer KEY'",
                code="key_in_query",
            )
        path = scope["path"]
        is_open = path in OPEN_PATHS or (path == "/metrics" and self._settings.open_metrics)
        if not is_open:
            values = [value for name, value in headers if name == b"authorization"]
            if len(values) > 1:
                raise ApiError(400, "more than one Authorization header")
            caller = self._gate.identify(values[0].decode("latin-1") if values else None)
            trace = {
                name.decode("latin-1"): value.decode("latin-1")
                for name, value in headers
                if name.decode("latin-1") in HEADERS
            }
            scope["visit"] = Visit(Arrival(caller, request_id, begin, trace))

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        visit: Visit | None = scope.get("visit")
        # Never the path itself: anyone may invent paths, and each label is kept for ever.
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.http_requests.labels(route, str(status)).inc()
        level = logging.DEBUG if route in (*OPEN_PATHS, "/metrics") else logging.INFO
        extra: dict[str, Any] = {
            "request_id": request_id,
            "tenant": None if visit is None else visit.arrival.caller.tenant,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
        }
        logger.log(level, "request", extra=extra)


def error_response(error: ApiError, path: str) -> JSONResponse:
    headers = error.headers
    if error.status == 401:
        # Basic makes browsers ask for the key when someone opens the page.
        scheme = "Basic" if path == "/" else "Bearer"
        headers["www-authenticate"] = f'{scheme} realm="llama-jax"'
    if error.status in (408, 413, 431) or error.code == TWO_LENGTHS:
        # The rest of such a request is not read.
        headers["connection"] = "close"
    return JSONResponse(error.to_json(), status_code=error.status, headers=headers)


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own, if it is short and plain, so that logs on both sides meet."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value.decode("latin-1")):
            return value.decode("ascii")
    return secrets.token_hex(12)
