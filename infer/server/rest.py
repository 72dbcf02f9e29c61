"""The REST routes: bodies to operations, answers to JSON or events."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infer.server.api_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from infer.server.body import read_body
from infer.server.chat import start_chat
from infer.server.completions import start_completion
from infer.server.errors import unknown_model
from infer.server.generation import Arrival, Context
from infer.server.sse import ClientLeftError, EventStream, run_while_connected
from infer.server.texts import detokenize, embed, tokenize
from infer.server.validation import Body, parse

_NOT_READY_SECONDS = 2
VERSION_HEADER = "x-llama-jax-version"


class Rest:
    """Endpoints over one context."""

    def __init__(self, context: Context):
        self._context = context

    def routes(self) -> list[Route]:
        return [
            Route("/healthz", self.healthz, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    # What orchestrators ask

    async def healthz(self, request: Request) -> Response:
        """The process is alive; says nothing of models."""
        return JSONResponse({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        models = self._context.models
        if models.is_ready:
            return JSONResponse({"status": models.condition})
        headers = {"retry-after": str(_NOT_READY_SECONDS)}
        return JSONResponse({"status": models.condition}, status_code=503, headers=headers)

    async def metrics(self, request: Request) -> Response:
        text = self._context.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # What clients ask

    async def models(self, request: Request) -> Response:
        entries = await asyncio.to_thread(self._context.models.reports.catalog)
        return JSONResponse({"object": "list", "data": entries})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        entry = await asyncio.to_thread(self._context.models.reports.entry, name)
        if entry is None:
            raise unknown_model(f"there is no model {name[:100]!r}")
        return JSONResponse(entry)

    async def chat(self, request: Request) -> Any:
        body = await self._body(request, ChatRequest)
        arrival = _arrival(request)
        generation, answer = start_chat(self._context, body, arrival)
        return await self._generate(request, body, generation, answer, {"body": body})

    async def completions(self, request: Request) -> Any:
        body = await self._body(request, CompletionRequest)
        arrival = _arrival(request)
        generation, answer = start_completion(self._context, body, arrival)
        return await self._generate(request, body, generation, answer, {})

    async def embeddings(self, request: Request) -> Response:
        body = await self._body(request, EmbeddingRequest)
        work = embed(self._context, body, _arrival(request))
        return await self._plain(request, work)

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeRequest)
        work = tokenize(self._context, body, _arrival(request))
        return await self._plain(request, work)

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeRequest)
        work = detokenize(self._context, body, _arrival(request))
        return await self._plain(request, work)

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        raw = await read_body(request, self._context.settings)
        return await self._context.read(len(raw), parse, kind, raw)

    async def _plain(self, request: Request, work: Any) -> Response:
        try:
            value, version = await run_while_connected(request.receive, work)
        except ClientLeftError:
            return _nobody()
        return JSONResponse(value, headers={VERSION_HEADER: version})

    async def _generate(
        self, request: Request, body: Any, generation: Any, kind: Any, more: dict[str, Any]
    ) -> Any:
        try:
            await run_while_connected(request.receive, generation.__aenter__())
        except ClientLeftError:
            return _nobody()
        answer = kind(
            generation,
            request_id=_arrival(request).request_id,
            model=body.model,
            usage=body.include_usage,
            **more,
        )
        headers = {VERSION_HEADER: answer.version}
        if body.stream:

            async def close(error: BaseException | None) -> None:
                await generation.__aexit__(type(error), _as_cancelled(error), None)

            return EventStream(answer.chunks(), headers=headers, close=close)
        error: BaseException | None = None
        try:
            whole = await run_while_connected(request.receive, answer.whole())
        except ClientLeftError as left:
            error = left
            return _nobody()
        except BaseException as raised:
            error = raised
            raise
        finally:
            await generation.__aexit__(type(error), _as_cancelled(error), None)
        return JSONResponse(whole, headers=headers)


def _arrival(request: Request) -> Arrival:
    arrival: Arrival = request.scope["visit"].arrival
    return arrival


def _as_cancelled(error: BaseException | None) -> BaseException | None:
    return GeneratorExit() if isinstance(error, ClientLeftError) else error


def _nobody() -> Response:
    """For a connection that is gone; 499 is what proxies log for it."""
    return Response(status_code=499)
