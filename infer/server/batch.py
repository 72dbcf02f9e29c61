"""A file of requests in OpenAI's batch form, answered by the server's own routes without a network.

Each answer is one line that is on the disk before it counts as done. A run that was killed goes on
where it was: an unfinished last line is cut off, and what is answered is not asked again.
"""

import asyncio
import fcntl
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message

from infer.server.app import make_app
from infer.server.errors import ApiError
from infer.server.generation import Context
from infer.server.loaded import Build, Source
from infer.server.run import make_context
from infer.server.settings import Settings
from llama_jax.formats.json_fields import check_characters, parse_json, read_text

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")

# What a line of answers begins with, and its fields.
_BEGINNING = b'{"id": "batch_req_'
_ANSWER = {"id", "custom_id", "response", "error"}

# Answers that say "not now": the request is asked again.
_BUSY = (429, 503)
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class Line:
    """A request of the file."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass
class Counts:
    """total: of the file; before: of them answered by earlier runs; failed: with an error."""

    total: int
    before: int
    done: int = 0
    failed: int = 0


def read_batch(path: Path) -> list[Line]:
    """Raises ValueError naming file and line."""
    lines: dict[str, Line] = {}
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        line = _read_line(text, f"{path}, line {number}")
        if line.custom_id in lines:
            raise ValueError(f"{path}, line {number}: custom_id {line.custom_id!r} comes twice")
        lines[line.custom_id] = line
    if not lines:
        raise ValueError(f"{path} holds no requests")
    return list(lines.values())


def _read_line(text: str, where: str) -> Line:
    try:
        row = parse_json(text, unique=True)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    wanted = {"custom_id", "method", "url", "body"}
    if not isinstance(row, dict) or set(row) != wanted:
        raise ValueError(f"{where}: a request has the fields {', '.join(sorted(wanted))}")
    if not isinstance(row["custom_id"], str) or not row["custom_id"]:
        raise ValueError(f"{where}: custom_id must be a text, not empty")
    check_characters(row["custom_id"], f"{where}: custom_id")
    if row["method"] != "POST" or row["url"] not in URLS:
        raise ValueError(f"{where}: method must be POST and url one of {', '.join(URLS)}")
    if not isinstance(row["body"], dict) or row["body"].get("stream"):
        raise ValueError(f"{where}: body must be an object, without stream")
    return Line(row["custom_id"], row["url"], row["body"])


@contextmanager
def open_answers(path: Path) -> Iterator[tuple[FileIO, set[str]]]:
    """The file of answers, to be appended to, and the ids it answers. One process at a time."""
    # Without a buffer, of which an end that could not be written would be tried again later.
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another run; wait for it") from None
        file.seek(0)
        content = file.readall()
        # What comes after the last line's end was being written when the run was killed.
        *whole, unfinished = content.split(b"\n")
        done = {_answered_id(text, path, number) for number, text in enumerate(whole, start=1)}
        if not _BEGINNING.startswith(unfinished[: len(_BEGINNING)]):
            raise _no_answer(path, len(whole) + 1)
        file.truncate(len(content) - len(unfinished))
        yield file, done


def _answered_id(text: bytes, path: Path, number: int) -> str:
    try:
        row = parse_json(text)
    except ValueError as error:
        raise _no_answer(path, number) from error
    if not isinstance(row, dict) or set(row) != _ANSWER or not isinstance(row["custom_id"], str):
        raise _no_answer(path, number)
    return row["custom_id"]


def _no_answer(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}, line {number} is no answer of a batch; give another file")


async def run_batch(
    source: Path,
    target: Path,
    *,
    settings: Settings,
    build: Build,
    model: Source,
    on_done: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Answers what is not answered yet, many requests at once.

    Raises ValueError for files that are no batch, RuntimeError when the engine fails and OSError
    when an answer cannot be written: then what is answered stays, and another run goes on.
    """
    lines = read_batch(source)

    def unanswered(done: set[str]) -> list[Line]:
        strangers = done - {line.custom_id for line in lines}
        if strangers:
            raise ValueError(
                f"{target} answers {min(strangers)!r}, which {source} does not ask; give another "
                f"file"
            )
        return [line for line in lines if line.custom_id not in done]

    # What is wrong with the file is said before the model is loaded, which may take long. A new
    # one is made only when it is loaded.
    if target.exists():
        if not (target.is_file() or target.is_dir()):
            raise ValueError(
                f"{target} is a device or a pipe; give a file, which a run can go on in"
            )
        with open_answers(target) as (_, done):
            if not unanswered(done):
                return Counts(len(lines), len(done))
    elif not (target.parent.is_dir() and os.access(target.parent, os.W_OK)):
        raise ValueError(
            f"{target} cannot be made: {target.parent} is no folder that you may write in; give "
            f"another file"
        )
    async with _started(settings, build, model) as context:
        with open_answers(target) as (file, done):
            counts = Counts(len(lines), len(done))
            await _answer_all(unanswered(done), file, counts, context, on_done)
            return counts


@asynccontextmanager
async def _started(settings: Settings, build: Build, model: Source) -> AsyncIterator[Context]:
    context = make_context(settings, build, [model])
    try:
        await context.models.start()
    except ApiError as error:
        # A model that is wrong is the caller's to mend; anything else is not.
        kind = ValueError if isinstance(error.__cause__, ValueError) else RuntimeError
        raise kind(error.message) from error
    try:
        yield context
    finally:
        await context.models.stop(0)


async def _answer_all(
    todo: list[Line],
    file: FileIO,
    counts: Counts,
    context: Context,
    on_done: Callable[[Counts], None],
) -> None:
    app, waiting = make_app(context), iter(todo)

    async def work() -> None:
        for line in waiting:
            status, request_id, body = await _answer(app, context, line)
            _append(file, line, status, request_id, body)
            counts.done += 1
            counts.failed += status != 200
            on_done(counts)

    try:
        # Twice as many as are computed at once, so that no slot waits for the next request.
        async with asyncio.TaskGroup() as group:
            for _ in range(min(len(todo), 2 * context.settings.max_slots)):
                group.create_task(work())
    except ExceptionGroup as errors:
        # Not `except*`: Python 3.11.2 wraps again what is raised there, 3.11.7 does not.
        if errors.split((RuntimeError, OSError))[1] is not None:
            raise
        raise errors.exceptions[0] from errors


async def _answer(app: ASGIApp, context: Context, line: Line) -> tuple[int, str, Any]:
    while True:
        status, headers, raw = await _post(app, line.url, json.dumps(line.body).encode())
        if status in _BUSY:
            await asyncio.sleep(_PAUSE_SECONDS)
            continue
        body = json.loads(raw)
        # An engine that is ready afterwards failed at this request alone, and would again.
        is_alone = status == 500 and body["error"]["code"] == "engine_failed"
        if status >= 500 and not (is_alone and context.models.is_ready):
            raise RuntimeError(f"{line.custom_id} was not answered: {raw.decode()[:500]}")
        return status, headers.get("x-request-id", ""), body


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"batch"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": ("batch", 0),
        "server": ("batch", 0),
    }
    status, headers, parts, is_sent = 0, {}, [], False

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            await asyncio.Event().wait()  # the client stays
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update({k.decode(): v.decode() for k, v in message["headers"]})
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, headers, b"".join(parts)


def _append(file: FileIO, line: Line, status: int, request_id: str, body: Any) -> None:
    answer = {
        "id": f"batch_req_{request_id}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
    }
    rest = memoryview(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
    begin = file.seek(0, os.SEEK_END)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:
        # Others may still write behind it.
        with suppress(OSError):
            file.truncate(begin)
        raise OSError(error.errno, error.strerror, str(file.name)) from error
