"""What comes out: pieces while it runs, an `Output` at the end, and the row that makes them.

No JAX here. A row takes one token id at a time and decides what text may be shown and when the
completion is over, the same way for streaming and not.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from infer.params import SamplingParams
from infer.stop import StopMatcher

if TYPE_CHECKING:
    from infer.sampling import Sampled
    from llama_jax.formats.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]

# Stands for log probabilities that JSON cannot hold (-inf and NaN); the value OpenAI uses.
LOGPROB_FLOOR = -9999.0


@dataclass(frozen=True)
class Alternative:
    """A token that might have been, with its log probability under the model alone."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A chosen token, and the most likely ones at its place, itself among them or not."""

    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step added to one choice of one prompt. The texts of all pieces join to the text of
    the `Output`; `finish_reason` comes with the last piece only, whose `token_ids` may be empty."""

    prompt_index: int
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Output:
    """One finished choice.

    prompt: as it was given (text, token ids or messages). text: up to and without the stop string
    or end token; with `echo`, after the prompt's text; None without a tokenizer. token_ids: the
    new tokens as sampled, an end token included. finish_reason: `stop` for an end token or stop
    string, `length` for the token limit or the end of the context. logprobs: one entry a new token.
    prompt_logprobs: with `echo` and `logprobs`, one entry a prompt token, the first None because
    nothing comes before it. index: the choice, 0 to n - 1.
    """

    prompt: Any
    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    prompt_token_ids: list[int]
    prompt_index: int
    index: int
    prompt_logprobs: list[TokenLogprob | None] | None = None


def make_logprob(
    tokenizer: "Tokenizer | None",
    token_id: int,
    logprob: float,
    top: Iterable[tuple[int, float]] = (),
) -> TokenLogprob:
    alternatives = tuple(Alternative(*_described(tokenizer, *pair)) for pair in top)
    return TokenLogprob(*_described(tokenizer, token_id, logprob), top=alternatives)


def _described(
    tokenizer: "Tokenizer | None", token_id: int, logprob: float
) -> tuple[int, str, bytes, float]:
    raw = b"" if tokenizer is None else tokenizer.token_bytes(token_id)
    value = max(float(logprob), LOGPROB_FLOOR) if not math.isnan(logprob) else LOGPROB_FLOOR
    return token_id, raw.decode("utf-8", "replace"), raw, value


@dataclass
class Row:
    """One choice while it is generated.

    limit: new tokens at most. continues_text: whether the new text follows the prompt's (then the
    prompt's tokens decide whether it begins with a space) or begins afresh, as a chat answer does.
    """

    prompt: Any
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    prompt_index: int
    index: int
    limit: int
    end_tokens: frozenset[int]
    tokenizer: "Tokenizer | None"
    continues_text: bool
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._matcher = StopMatcher(self.params.stop)
        self._decoder = None if self.tokenizer is None else self.tokenizer.decode_stream()
        prompt_text = ""
        if self._decoder is not None and self.continues_text:
            # Also finishes a character whose first bytes the prompt ended with.
            prompt_text = "".join(map(self._decoder.push, self.prompt_token_ids))
        if self.params.echo and self.tokenizer is not None:
            self.text = prompt_text or self.tokenizer.decode(self.prompt_token_ids)
        self._shown = 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.echo and self.params.logprobs is not None

    def start(self) -> Iterator[Piece]:
        """The pieces before any token: the echoed prompt's, or the only one when there may be no
        tokens."""
        if self.limit == 0:
            self.finish_reason = "length"
        if self.text or self.finish_reason is not None:
            yield self._piece(())

    def push(self, token_id: int, logprob: TokenLogprob | None) -> Piece:
        """Takes a sampled token. Not to be called once `finish_reason` is set."""
        assert self.finish_reason is None
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self.end_tokens and not self.params.ignore_eos:
            self._end("stop")
        else:
            if self._decoder is not None:
                self._show(self._decoder.push(token_id))
            if self.finish_reason is None and len(self.token_ids) >= self.limit:
                self._end("length")
        return self._piece((token_id,))

    def logprob_of(self, sampled: "Sampled", place: int) -> TokenLogprob | None:
        """Of the token at a place of what a step sampled, where they are asked for."""
        if self.params.logprobs is None:
            return None
        assert sampled.logprob is not None
        assert sampled.top_logprobs is not None and sampled.top_tokens is not None
        return self.scored(
            int(sampled.tokens[place]),
            sampled.logprob[place],
            sampled.top_logprobs[place],
            sampled.top_tokens[place],
        )

    def scored(
        self, token_id: int, logprob: Any, top_logprobs: Any, top_tokens: Any
    ) -> TokenLogprob:
        """A token of the prompt or the answer with its log probability, and as many of the most
        likely ones [K] at its place as are asked for."""
        num = self.params.logprobs
        pairs = zip(top_tokens[:num].tolist(), top_logprobs[:num].tolist(), strict=True)
        return make_logprob(self.tokenizer, token_id, float(logprob), pairs)

    def output(self) -> Output:
        assert self.finish_reason is not None
        return Output(
            prompt=self.prompt,
            text=None if self.tokenizer is None else self.text,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            logprobs=None if self.params.logprobs is None else list(self.logprobs),
            prompt_token_ids=list(self.prompt_token_ids),
            prompt_index=self.prompt_index,
            index=self.index,
            prompt_logprobs=self.prompt_logprobs,
        )

    def _show(self, text: str) -> None:
        if len(self.token_ids) <= self.params.min_tokens:
            self.text += text
            return
        self.text += self._matcher.push(text)
        if self._matcher.stopped is not None:
            self.finish_reason = "stop"

    def _end(self, reason: FinishReason) -> None:
        """No more tokens: what was held back comes out, unless it completes a stop string."""
        if self._decoder is not None:
            self._show(self._decoder.flush())
        if self.finish_reason is None:
            self.text += self._matcher.flush()
            self.finish_reason = reason

    def _piece(self, token_ids: tuple[int, ...]) -> Piece:
        text, self._shown = self.text[self._shown :], len(self.text)
        logprobs: Sequence[TokenLogprob] = self.logprobs[-1:] if token_ids else ()
        return Piece(
            prompt_index=self.prompt_index,
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=tuple(logprobs),
            finish_reason=self.finish_reason,
        )
