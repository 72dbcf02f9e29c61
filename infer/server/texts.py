"""Operations that generate nothing: embeddings, and text to tokens and back."""

import asyncio
import base64
import struct
from typing import TYPE_CHECKING, Any

from infer.server.api_types import (
    ChatRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    refused,
)
from infer.server.chat import chat_ids
from infer.server.completions import place_of, prompt_ids
from infer.server.errors import ApiError
from infer.server.generation import Arrival, Context
from infer.server.loaded import Lease

if TYPE_CHECKING:
    from llama_jax.formats.tokenizer import Tokenizer

Result = tuple[dict[str, Any], str]


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
        lease = await context.models.lease(body.model, arrival.request_id)
        if lease.adapter is not None:
            raise ApiError(400, "embeddings are of the base model; name no adapter", param="model")
        with context.models.use(lease):
            try:
                async with asyncio.timeout(context.settings.request_timeout_seconds):
                    rows, tokens = await context.embeddings.run(_embed_all, lease, inputs)
            except TimeoutError:
                raise ApiError(504, "not done in time", code="timeout") from None
            except ValueError as error:
                raise refused(error) from error
    version = lease.loaded.fingerprint
    data = [
        {
            "object": "embedding",
            "index": place,
            "embedding": row if body.encoding_format == "float" else _base64(row),
        }
        for place, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}, version


def _embed_all(lease: Lease, inputs: list[str | list[int]]) -> tuple[list[list[float]], int]:
    ids = [
        prompt_ids(lease, each, place_of("input", place, inputs))
        for place, each in enumerate(inputs)
    ]
    return [lease.loaded.engine.embed(each) for each in ids], sum(map(len, ids))


def _base64(row: list[float]) -> str:
    """Little-endian float32, as OpenAI's clients ask for by default."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


async def tokenize(context: Context, body: TokenizeRequest, arrival: Arrival) -> Result:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.messages is not None and not body.add_special_tokens:
        raise ApiError(
            400,
            "add_special_tokens is about prompt; a conversation has what its template writes",
            param="add_special_tokens",
        )
    lease = await context.models.lease(body.model, arrival.request_id)

    def ids() -> list[int]:
        tokenizer = _tokenizer(lease)
        if body.messages is None:
            assert body.prompt is not None
            return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        return chat_ids(lease, ChatRequest(model=body.model, messages=body.messages))

    with context.models.use(lease):
        try:
            tokens = await asyncio.to_thread(ids)
        except ValueError as error:
            raise refused(error) from error
        limit = lease.loaded.engine.max_context
    value = {"tokens": tokens, "count": len(tokens), "max_model_len": limit}
    return value, lease.loaded.fingerprint


async def detokenize(context: Context, body: DetokenizeRequest, arrival: Arrival) -> Result:
    lease = await context.models.lease(body.model, arrival.request_id)
    skip = body.skip_special_tokens

    def text() -> str:
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

    with context.models.use(lease):
        prompt = await asyncio.to_thread(text)
    return {"prompt": prompt}, lease.loaded.fingerprint


def _tokenizer(lease: Lease) -> "Tokenizer":
    if lease.loaded.tokenizer is None:
        raise ApiError(400, f"{lease.loaded.name} has no tokenizer", param="model")
    return lease.loaded.tokenizer
