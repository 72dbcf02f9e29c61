"""Reading a request's body within limits, packed or not."""

import asyncio
import contextlib
import re
import time
import zlib

from starlette.requests import Request

from infer.server.errors import ApiError
from infer.server.settings import Settings

_GZIP = 16 + zlib.MAX_WBITS
_JSON = re.compile(r"application/([\w.+-]+\+)?json", re.ASCII)
# A client that is still sending hears an answer only when it has sent it all, or when it looks;
# so what is too long is read and dropped for a moment before the refusal.
_LINGER_SECONDS, _LINGER_BYTES = 1.0, 64 * 2**20


async def read_body(request: Request, settings: Settings) -> bytes:
    """The unpacked body. Raises ApiError 400, 408, 413, 415."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if not _JSON.fullmatch(kind):
        raise ApiError(400, f"the content type is {kind!r}; send application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise ApiError(415, f"the content encoding is {encoding!r}; send gzip or none")
    limit = settings.max_body_bytes
    too_long = ApiError(413, f"the body is over {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        if "expect" not in request.headers:
            await _drop(request)
        raise too_long
    unpack = zlib.decompressobj(_GZIP) if encoding == "gzip" else None
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(settings.body_timeout_seconds):
            while more and len(body) <= limit:
                chunk, more = await _receive(request)
                # One byte more than allowed is enough to know.
                body += chunk if unpack is None else _unpacked(unpack, chunk, limit + 1 - len(body))
    except TimeoutError:
        seconds = settings.body_timeout_seconds
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from None
    if len(body) > limit:
        if more:
            await _drop(request)
        raise too_long
    if unpack is not None and not unpack.eof:
        raise ApiError(400, "the body ends within its gzip data")
    return bytes(body)


async def _receive(request: Request) -> tuple[bytes, bool]:
    """The next part of the body, and whether there is more."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ApiError(400, "the client left before its body was there")
    return message.get("body", b""), message.get("more_body", False)


def _unpacked(unpack: "zlib._Decompress", chunk: bytes, room: int) -> bytes:
    try:
        data = unpack.decompress(chunk, room)
    except zlib.error as error:
        raise ApiError(400, f"the body is not gzip: {error}") from error
    if unpack.unused_data:
        # zlib would keep all that follows, however much it is.
        raise ApiError(400, "the body goes on after its gzip data; send one gzip member")
    return data


async def _drop(request: Request) -> None:
    dropped, more, end = 0, True, time.monotonic() + _LINGER_SECONDS
    with contextlib.suppress(TimeoutError, ApiError):
        async with asyncio.timeout(_LINGER_SECONDS):
            # The clock is asked too: reading what is already there never waits.
            while more and dropped < _LINGER_BYTES and time.monotonic() < end:
                chunk, more = await _receive(request)
                dropped += len(chunk)
