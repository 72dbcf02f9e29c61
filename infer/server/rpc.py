"""gRPC beside REST: the same operations, keys and limits, with health and reflection."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from infer.server import rpc_messages as messages
from infer.server.answers import Answer
from infer.server.api_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from infer.server.auth import Caller
from infer.server.chat import start_chat
from infer.server.completions import start_completion
from infer.server.errors import ApiError
from infer.server.generation import Arrival, Context, Generation
from infer.server.texts import detokenize, embed, tokenize
from infer.server.tracing import HEADERS
from infer.server.validation import Body, validated

logger = logging.getLogger(__name__)

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_HEALTH = "/grpc.health.v1.Health/"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEALTH_SECONDS = 0.5

Pieces = AsyncGenerator[Message, None]
Rpc: TypeAlias = Any  # grpc.aio.ServicerContext; the package has no types


@dataclass
class GrpcServer:
    """A running one."""

    server: grpc.aio.Server
    port: int
    watching: asyncio.Task[None]

    async def stop(self, seconds: float) -> None:
        self.watching.cancel()
        await self.server.stop(seconds)


async def start_grpc(context: Context, host: str, port: int) -> GrpcServer:
    """Listens at once. Raises OSError when the port is taken."""
    limit = context.settings.max_body_bytes
    # gRPC itself lets one too many wait, or refuses it without saying when to come again: `Methods`
    # refuses before it.
    most_calls = 2 * context.settings.max_connections
    server = grpc.aio.server(
        interceptors=[_Keys(context)],
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_metadata_size", context.settings.max_header_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", most_calls),
        ],
        maximum_concurrent_rpcs=most_calls,
    )
    methods = Methods(context)
    server.add_generic_rpc_handlers((methods.handler(),))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (messages.SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(where)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {where} for gRPC") from error
    await server.start()
    watching = asyncio.create_task(_report_health(context, health))
    return GrpcServer(server, bound, watching)


async def _report_health(context: Context, health: HealthServicer) -> None:
    """Readiness, as the health service tells it."""
    status = health_pb2.HealthCheckResponse
    told = None
    while True:
        now = status.SERVING if context.models.is_ready else status.NOT_SERVING
        if now != told:
            for name in ("", messages.SERVICE):
                await health.set(name, now)
            told = now
        await asyncio.sleep(HEALTH_SECONDS)


class _Keys(grpc.aio.ServerInterceptor):
    """Refuses calls without a known key, all but health."""

    def __init__(self, context: Context):
        self._gate = context.gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH):
            return handler
        try:
            _identify(self._gate.identify, handler_call_details.invocation_metadata)
        except ApiError as error:
            return _refusing(handler, error)
        return handler


def _identify(identify: Callable[[str | None], Caller], metadata: Any) -> Caller:
    values = [value for key, value in metadata or () if key == "authorization"]
    if len(values) > 1:
        raise ApiError(400, "more than one authorization in the metadata; send one")
    return identify(str(values[0]) if values else None)


def _refusing(handler: Any, error: ApiError) -> Any:
    """A handler of the same kind that answers with the error."""

    async def whole(request: Any, rpc: Rpc) -> None:
        await _abort(rpc, error)

    async def stream(request: Any, rpc: Rpc) -> AsyncIterator[Any]:
        await _abort(rpc, error)
        yield

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(stream if handler.response_streaming else whole)


@contextlib.asynccontextmanager
async def _errors_as_codes(rpc: Rpc) -> AsyncIterator[None]:
    """What a call raises, as a gRPC code; what nobody foresaw is logged and told without detail."""
    try:
        yield
    except ApiError as error:
        await _abort(rpc, error)
    except Exception as error:
        logger.error("unexpected", exc_info=error)
        await _abort(rpc, ApiError(500, "internal error"))


async def _abort(rpc: Rpc, error: ApiError) -> None:
    trailing = tuple(error.headers.items())
    await rpc.abort(_CODES.get(error.status, grpc.StatusCode.UNKNOWN), error.message, trailing)


class Methods:
    """The service's methods."""

    def __init__(self, context: Context):
        self._context = context
        self._running = 0

    def handler(self) -> grpc.GenericRpcHandler:
        implemented = {
            "ListModels": self.list_models,
            "Complete": self.complete,
            "StreamComplete": self.stream_complete,
            "Chat": self.chat,
            "StreamChat": self.stream_chat,
            "Embed": self.embed,
            "Tokenize": self.tokenize,
            "Detokenize": self.detokenize,
        }
        handlers = {}
        for method in messages.service().methods:
            call = implemented[method.name]
            make = (
                grpc.unary_stream_rpc_method_handler
                if method.server_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            answering = self._answering_stream if method.server_streaming else self._answering
            handlers[method.name] = make(
                # Without a deserializer of gRPC's, which answers UNKNOWN to what it cannot read.
                answering(call, messages.message_class(method.input_type.name)),
                response_serializer=lambda message: message.SerializeToString(),
            )
        return grpc.method_handlers_generic_handler(messages.SERVICE, handlers)

    def _answering(self, call: Any, kind: type[Message]) -> Any:
        async def answer(raw: bytes, rpc: Rpc) -> Any:
            async with _errors_as_codes(rpc):
                with self._place():
                    return await call(messages.parse_message(kind, raw), self._arrival(rpc))

        return answer

    def _answering_stream(self, call: Any, kind: type[Message]) -> Any:
        async def answer(raw: bytes, rpc: Rpc) -> Pieces:
            async with _errors_as_codes(rpc):
                with self._place():
                    request = messages.parse_message(kind, raw)
                    async with contextlib.aclosing(call(request, self._arrival(rpc))) as pieces:
                        async for piece in pieces:
                            yield piece

        return answer

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Counts a call while it runs. Raises ApiError 429 for one too many."""
        limit = self._context.settings.max_connections
        if self._running >= limit:
            message = f"{limit} calls run, as many as may (max_connections)"
            raise ApiError(429, message, code="too_many_calls", retry_after_seconds=1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _arrival(self, rpc: Rpc) -> Arrival:
        metadata = list(rpc.invocation_metadata() or ())
        caller = _identify(self._context.gate.identify, metadata)
        given = [str(value) for key, value in metadata if key == "x-request-id"]
        is_plain = bool(given) and _REQUEST_ID.fullmatch(given[0]) is not None
        request_id = given[0] if is_plain else secrets.token_hex(12)
        trace = {key: str(value) for key, value in metadata if key in HEADERS}
        return Arrival(caller, request_id, time.perf_counter(), trace)

    async def list_models(self, request: Message, arrival: Arrival) -> Message:
        names = ("id", "version", "loaded", "max_model_len", "parent")
        rows = [
            {name: entry[name] for name in names if entry.get(name) is not None}
            for entry in await asyncio.to_thread(self._context.models.reports.catalog)
        ]
        return messages.to_message("ListModelsResponse", {"data": rows})

    async def complete(self, request: Message, arrival: Arrival) -> Message:
        async with self._completion(request, arrival) as answer:
            return messages.completion_message(await answer.whole())

    async def stream_complete(self, request: Message, arrival: Arrival) -> Pieces:
        async with (
            self._completion(request, arrival) as answer,
            contextlib.aclosing(answer.chunks()) as chunks,
        ):
            async for chunk in chunks:
                yield messages.completion_message(chunk)

    async def chat(self, request: Message, arrival: Arrival) -> Message:
        async with self._chat(request, arrival) as answer:
            return messages.chat_message(await answer.whole())

    async def stream_chat(self, request: Message, arrival: Arrival) -> Pieces:
        async with (
            self._chat(request, arrival) as answer,
            contextlib.aclosing(answer.chunks()) as chunks,
        ):
            async for chunk in chunks:
                yield messages.chat_message(chunk)

    @contextlib.asynccontextmanager
    async def _completion(self, request: Message, arrival: Arrival) -> AsyncIterator[Answer]:
        body = await self._body(CompletionRequest, request, messages.completion_body)
        generation, kind = start_completion(self._context, body, arrival)
        async with generation:
            yield kind(generation, **_options(generation, arrival, body.model))

    @contextlib.asynccontextmanager
    async def _chat(self, request: Message, arrival: Arrival) -> AsyncIterator[Answer]:
        body = await self._body(ChatRequest, request, messages.chat_body)
        generation, kind = start_chat(self._context, body, arrival)
        async with generation:
            yield kind(generation, body=body, **_options(generation, arrival, body.model))

    async def embed(self, request: Any, arrival: Arrival) -> Message:
        body = await self._body(EmbeddingRequest, request, messages.embedding_body)
        answer, version = await embed(self._context, body, arrival)
        rows = [{"values": row["embedding"]} for row in answer["data"]]
        usage = messages.to_usage(answer["usage"])
        fields = {"data": rows, "usage": usage, "version": version}
        return messages.to_message("EmbeddingResponse", fields)

    async def tokenize(self, request: Any, arrival: Arrival) -> Message:
        body = await self._body(TokenizeRequest, request, messages.tokenize_body)
        answer, version = await tokenize(self._context, body, arrival)
        fields = {name: answer[name] for name in ("tokens", "max_model_len")}
        return messages.to_message("TokenizeResponse", {**fields, "version": version})

    async def detokenize(self, request: Any, arrival: Arrival) -> Message:
        body = await self._body(DetokenizeRequest, request, messages.detokenize_body)
        answer, version = await detokenize(self._context, body, arrival)
        return messages.to_message("DetokenizeResponse", {**answer, "version": version})

    async def _body(
        self, kind: type[Body], request: Message, values: Callable[[Any], dict[str, Any]]
    ) -> Body:
        def read() -> Body:
            return validated(kind, values(request))

        return await self._context.read(request.ByteSize(), read)


def _options(generation: Generation, arrival: Arrival, model: str) -> dict[str, Any]:
    return {"request_id": arrival.request_id, "model": model, "usage": True}
