"""Operations that generate nothing: embeddings, and text to tokens and back."""

import asyncio
import base64
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from infer.engine.request import NotReadyError
from infer.server.api_types import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from infer.server.chat import chat_ids, check_chat
from infer.server.completions import place_of, prompt_ids
from infer.server.errors import ApiError, not_ready
from infer.server.generation import Arrival, Context
from infer.server.loaded import Lease
from infer.server.validation import refused

if TYPE_CHECKING:
    from llama_jax.formats.tokenizer import Tokenizer

Result = tuple[dict[str, Any], str]


@asynccontextmanager
async def _lease(context: Context, model: str, arrival: Arrival) -> AsyncIterator[Lease]:
    """The version that answers, in use, until the request's time is over. Raises ApiError, also
    for what the engine and the tokenizer raise inside."""
    seconds = context.settings.request_timeout_seconds
    try:
        async with asyncio.timeout(max(0.0, seconds - (time.perf_counter() - arrival.seconds))):
            lease = await context.models.lease(model, arrival.request_id)
            with context.models.use(lease):
                yield lease
    except TimeoutError:
        raise ApiError(504, f"not done within {seconds:g} seconds", code="timeout") from None
    except NotReadyError as error:
        raise not_ready(str(error)) from error
    except ValueError as error:
        raise refused(error) from error


async def embed(context: Context, body: EmbeddingRequest, arrival: Arrival) -> Result:
    """The answer and the version it is from. Raises ApiError."""
    inputs = body.inputs()
    limit = context.settings.max_prompts
    if len(inputs) > limit:
        raise ApiError(400, f"input has {len(inputs)} entries, over {limit}", param="input")
    if body.dimensions is not None:
        raise ApiError(
            400,
            f"dimensions is {body.dimensions}; only the model's own size is offered, leave it out",
            param="dimensions",
        )
    with context.gate.admit(arrival.caller):
        async with _lease(context, body.model, arrival) as lease:
            if lease.adapter is not None:
                problem = "embeddings are of the base model; name no adapter"
                raise ApiError(400, problem, param="model")
            rows, tokens = await context.embeddings.run(_embed_all, lease, inputs)
    version = lease.loaded.fingerprint
    data = [
        {
            "object": "embedding",
            "index": place,
            "embedding": _base64(row) if body.encoding_format == "base64" else row,
        }
        for place, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}, version


def _embed_all(lease: Lease, inputs: list[str | list[int]]) -> tuple[list[list[float]], int]:
    fields = [place_of("input", place, inputs) for place in range(len(inputs))]
    ids = [prompt_ids(lease, each, field) for each, field in zip(inputs, fields, strict=True)]
    rows = []
    for each, field in zip(ids, fields, strict=True):
        try:
            rows.append(lease.loaded.engine.embed(each))
        except ValueError as error:
            raise refused(error, prompt=field) from error
    return rows, sum(map(len, ids))


def _base64(row: list[float]) -> str:
    """Little-endian float32, as OpenAI's clients ask for by default."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


async def tokenize(context: Context, body: TokenizeRequest, arrival: Arrival) -> Result:
    chat = body.chat()
    if chat is not None:
        check_chat(context, chat)

    def ids(lease: Lease) -> list[int]:
        if chat is not None:
            return chat_ids(lease, chat)
        assert body.prompt is not None
        has_special = body.add_special_tokens is not False
        return _tokenizer(lease).encode(body.prompt, add_special_tokens=has_special)

    async with _lease(context, body.model, arrival) as lease:
        tokens = await context.in_texts(ids, lease)
        context_tokens = lease.loaded.engine.max_context
    value = {"tokens": tokens, "count": len(tokens), "max_model_len": context_tokens}
    return value, lease.loaded.fingerprint


async def detokenize(context: Context, body: DetokenizeRequest, arrival: Arrival) -> Result:
    skip = bool(body.skip_special_tokens)

    def text(lease: Lease) -> str:
        tokenizer = _tokenizer(lease)
        for token in body.tokens:
            if tokenizer.id_to_token(token) is None:
                raise ApiError(
                    400,
                    f"tokens: {token} is no token of {lease.loaded.name}; its ids are those that "
                    "/tokenize gives",
                    param="tokens",
                )
        return tokenizer.decode(body.tokens, skip_special_tokens=skip)

    async with _lease(context, body.model, arrival) as lease:
        prompt = await context.in_texts(text, lease)
    return {"prompt": prompt}, lease.loaded.fingerprint


def _tokenizer(lease: Lease) -> "Tokenizer":
    if lease.loaded.tokenizer is None:
        raise ApiError(400, f"{lease.loaded.name} has no tokenizer", param="model")
    return lease.loaded.tokenizer
