"""One API request on its way through the engine: accepted, listened to, measured, ended.

REST and gRPC share this. A `Generation` is entered once the body is valid; inside, the engine has
the request, and leaving it, however that happens, frees everything.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from infer.completion import Piece
from infer.engine.request import Failed, Finished, NotReadyError, QueueFullError, Request, Started
from infer.engine.structure import StructureError
from infer.server.auth import Caller, Gate
from infer.server.errors import ApiError
from infer.server.loaded import Lease, Loaded
from infer.server.mailbox import Mailbox, Waker
from infer.server.metrics import Metrics
from infer.server.models import Models
from infer.server.pool import Pool
from infer.server.settings import Settings
from infer.server.tracing import Times, Traced, Tracing
from infer.server.validation import refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrival:
    """Who asked, under which id, and when (of `time.perf_counter`). trace: the headers that name
    the client's own span."""

    caller: Caller
    request_id: str
    seconds: float
    trace: Mapping[str, str] = field(default_factory=dict)


# Bodies over this are read in a thread.
LONG_BYTES = 64 * 2**10

Result = TypeVar("Result")


@dataclass(frozen=True)
class Context:
    """What every operation needs of its server. texts: threads for long bodies, templates and
    tokenizers, apart from those that submit and load."""

    settings: Settings
    models: Models
    gate: Gate
    metrics: Metrics
    waker: Waker
    embeddings: Pool
    tracing: Tracing | None = None
    texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "texts"))

    async def in_texts(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Work in those threads."""
        return await asyncio.get_running_loop().run_in_executor(self.texts, work, *arguments)

    async def read(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """Work on a body or message of `size` bytes: there if it is long, so that streams of others
        go on meanwhile, else here and at once."""
        if size <= LONG_BYTES:
            return work(*arguments)
        return await self.in_texts(work, *arguments)


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


Prepare = Callable[[Lease, str], list[Request]]


class Generation:
    """See the module. Use as `async with`.

    prepare: makes the engine's requests from a lease and an id; runs in a thread, because
    templates and tokenizers may take their time. It raises ValueError for what a client must mend.
    structure_field: where the body says what the text must match.
    """

    def __init__(
        self,
        context: Context,
        arrival: Arrival,
        endpoint: str,
        model: str,
        prepare: Prepare,
        *,
        structure_field: str = "response_format",
    ):
        self._context, self._arrival = context, arrival
        self._endpoint, self._model, self._prepare = endpoint, model, prepare
        self._structure_field = structure_field
        self._stack = contextlib.ExitStack()
        self._mailbox = Mailbox(context.waker)
        self._requests: list[Request] = []
        self._unfinished: set[int] = set()
        self._outcome = "error"
        self._has_ended = False
        self._times = Times(arrival.seconds)
        self.usage = Usage()
        self._lease: Lease | None = None

    @property
    def loaded(self) -> Loaded:
        assert self._lease is not None
        return self._lease.loaded

    @property
    def requests(self) -> list[Request]:
        return self._requests

    async def __aenter__(self) -> "Generation":
        try:
            await self._accept()
        except BaseException as error:
            self._fail(error)
            self._close()
            raise
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._fail(error)
        self._close()

    async def _accept(self) -> None:
        context, arrival = self._context, self._arrival
        self._stack.enter_context(context.gate.admit(arrival.caller))
        context.metrics.active.inc()
        self._stack.callback(context.metrics.active.dec)
        try:
            async with self._timeout():
                self._lease = await context.models.lease(self._model, arrival.request_id)
                self._stack.enter_context(context.models.use(self._lease))
                # Ids of requests are the server's own: a client may send the same one twice.
                unique = f"{arrival.request_id}-{secrets.token_hex(8)}"
                self._requests = await context.in_texts(self._prepared, unique)
                for prompt, request in enumerate(self._requests):
                    await asyncio.to_thread(self._submit, prompt, request)
        except TimeoutError:
            raise self._timed_out() from None

    def _prepared(self, unique: str) -> list[Request]:
        assert self._lease is not None
        try:
            return self._prepare(self._lease, unique)
        except ValueError as error:
            raise refused(error) from error

    def _submit(self, prompt: int, request: Request) -> None:
        try:
            self._unfinished.add(prompt)
            if self._times.submitted is None:
                self._times.submitted = time.perf_counter()
            self.loaded.engine.submit(request, self._mailbox.receiver(prompt))
            # This runs in a thread: the client may have left before the engine had the request.
            if self._has_ended:
                self.loaded.engine.cancel(request.id)
        except QueueFullError as error:
            self._unfinished.discard(prompt)
            raise ApiError(
                429, str(error), code="queue_full", retry_after_seconds=error.retry_after_seconds
            ) from error
        except NotReadyError as error:
            self._unfinished.discard(prompt)
            raise ApiError(
                503, str(error), code="model_not_ready", retry_after_seconds=2
            ) from error
        except StructureError as error:
            self._unfinished.discard(prompt)
            raise ApiError(400, str(error), param=self._structure_field) from error
        except ValueError as error:
            self._unfinished.discard(prompt)
            field = f"prompt.{prompt}" if len(self._requests) > 1 else "prompt"
            raise refused(error, prompt=field) from error

    async def events(self) -> AsyncGenerator[tuple[int, Started | Piece], None]:
        """What the engine says, with the prompt it is about, until all prompts have ended.

        Raises ApiError when the engine fails, the time is over or the client is too slow.
        """
        while self._unfinished:
            try:
                async with self._timeout():
                    arrived = await self._mailbox.take()
            except TimeoutError:
                raise self._timed_out() from None
            if self._mailbox.has_overflowed:
                raise ApiError(503, "the client reads too slowly", code="slow_client")
            for prompt, event in arrived:
                if isinstance(event, Failed):
                    raise self._failed(event)
                if isinstance(event, Finished):
                    self._finish(prompt, event)
                else:
                    if isinstance(event, Started) and self._times.queued is None:
                        self._times.queued = event.queued_seconds
                        self._context.metrics.queue.labels(*self._labels).observe(
                            event.queued_seconds
                        )
                    if isinstance(event, Piece) and event.token_ids:
                        self._measure()
                    yield prompt, event
        self._outcome = "done"

    def _finish(self, prompt: int, event: Finished) -> None:
        self._unfinished.discard(prompt)
        self.usage.prompt_tokens += event.prompt_tokens
        self.usage.completion_tokens += event.completion_tokens
        self.usage.cached_tokens += event.cached_tokens

    def _failed(self, event: Failed) -> ApiError:
        if event.reason == "request":
            return ApiError(400, event.message, param=self._structure_field)
        if event.reason == "engine":
            return ApiError(500, f"the engine failed: {event.message}", code="engine_failed")
        if event.reason == "drained":
            return ApiError(503, "the server shut down", code="shutting_down")
        return ApiError(503, event.message or "cancelled", code="cancelled")

    def _measure(self) -> None:
        times = self._times
        times.last_token = time.perf_counter()
        if times.first_token is None:
            times.first_token = times.last_token
            self._context.metrics.first_token.labels(*self._labels).observe(
                times.first_token - times.arrived
            )

    @property
    def _labels(self) -> tuple[str, str]:
        return (self.loaded.name, self.loaded.version)

    def _timeout(self) -> asyncio.Timeout:
        passed = time.perf_counter() - self._arrival.seconds
        return asyncio.timeout(max(0.0, self._context.settings.request_timeout_seconds - passed))

    def _timed_out(self) -> ApiError:
        seconds = self._context.settings.request_timeout_seconds
        return ApiError(504, f"not done within {seconds:g} seconds", code="timeout")

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._outcome = "cancelled"
        elif isinstance(error, ApiError):
            self._outcome = error.code or "refused"
        else:
            self._outcome = "error"

    def _close(self) -> None:
        self._has_ended = True
        if self._lease is not None:
            for prompt in list(self._unfinished):
                self.loaded.engine.cancel(self._requests[prompt].id)
            self._record()
        self._stack.close()

    def _record(self) -> None:
        metrics, usage, times = self._context.metrics, self.usage, self._times
        now = time.perf_counter()
        metrics.requests.labels(*self._labels, self._endpoint, self._outcome).inc()
        metrics.prompt_tokens.labels(*self._labels).inc(usage.prompt_tokens)
        metrics.completion_tokens.labels(*self._labels).inc(usage.completion_tokens)
        metrics.request_seconds.labels(*self._labels).observe(now - self._arrival.seconds)
        if times.first_token is not None and usage.completion_tokens > 1:
            assert times.last_token is not None
            metrics.per_token.labels(*self._labels).observe(
                (times.last_token - times.first_token) / (usage.completion_tokens - 1)
            )
        self._trace(now)
        logger.info(
            "generation",
            extra={
                "request_id": self._arrival.request_id,
                "tenant": self._arrival.caller.tenant,
                "endpoint": self._endpoint,
                "model": self.loaded.name,
                "version": self.loaded.version,
                "outcome": self._outcome,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
                "seconds": round(now - self._arrival.seconds, 4),
            },
        )

    def _trace(self, now: float) -> None:
        if self._context.tracing is None:
            return
        attributes = {
            "llama_jax.request_id": self._arrival.request_id,
            "llama_jax.tenant": self._arrival.caller.tenant,
            "gen_ai.request.model": self.loaded.name,
            "gen_ai.response.model": self.loaded.fingerprint,
            "gen_ai.usage.input_tokens": self.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": self.usage.completion_tokens,
            "llama_jax.cached_tokens": self.usage.cached_tokens,
        }
        self._context.tracing.record(
            Traced(self._endpoint, self._outcome, self._times, now, attributes, self._arrival.trace)
        )
