"""What both generation endpoints answer with: pieces that are gathered, chunks that are sent.

An `Answer` is a running generation seen as OpenAI's objects: `whole()` once, or `chunks()` one by
one. Either ends it.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from infer.completion import Alternative, Piece, TokenLogprob
from infer.engine.request import Started
from infer.server.generation import Generation


@dataclass
class Choice:
    """What a choice has become so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: str | None = None


class Answer(ABC):
    """One request's. kind: what OpenAI calls the whole object; its chunks add `.chunk` for chat."""

    kind: str
    chunk_kind: str
    id_prefix: str

    def __init__(self, generation: Generation, *, request_id: str, model: str, usage: bool):
        self._generation = generation
        self._include_usage = usage
        self._head = {
            "id": f"{self.id_prefix}{request_id}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": generation.loaded.fingerprint,
        }

    @property
    def version(self) -> str:
        return self._generation.loaded.fingerprint

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream, the one with the usage last if it was asked for."""
        head = {**self._head, "object": self.chunk_kind}
        # OpenAI has the key in every chunk of such a stream, null but in the last.
        nothing = {"usage": None} if self._include_usage else {}
        async with contextlib.aclosing(self._generation.events()) as events:
            async for prompt, event in events:
                for choice in self._chunk_choices(prompt, event):
                    yield {**head, "choices": [choice], **nothing}
        if self._include_usage:
            yield {**head, "choices": [], "usage": self._generation.usage.to_json()}

    async def whole(self) -> dict[str, Any]:
        async with contextlib.aclosing(self._generation.events()) as events:
            async for prompt, event in events:
                self._gather(prompt, event)
        return {
            **self._head,
            "choices": self._whole_choices(),
            "usage": self._generation.usage.to_json(),
        }

    @abstractmethod
    def _chunk_choices(self, prompt: int, event: Started | Piece) -> Iterator[dict[str, Any]]:
        """The choice objects that an event of a stream makes."""

    @abstractmethod
    def _gather(self, prompt: int, event: Started | Piece) -> None: ...

    @abstractmethod
    def _whole_choices(self) -> list[dict[str, Any]]: ...


def token_text(token: Alternative) -> str:
    """The token as text; bytes that are no whole characters in the form OpenAI writes them."""
    try:
        return token.bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
