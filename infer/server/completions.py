"""/v1/completions: texts or token ids in, texts out."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from infer.completion import Alternative, Piece, TokenLogprob
from infer.engine.options import parse_mesh
from infer.engine.request import Request, Started
from infer.params import DEFAULT_MAX_TOKENS, SamplingParams
from infer.server.answers import Answer, Choice, token_text
from infer.server.api_types import CompletionRequest
from infer.server.errors import ApiError
from infer.server.generation import Arrival, Context, Generation, Prepare
from infer.server.loaded import Lease
from infer.server.settings import Settings


def start_completion(
    context: Context, body: CompletionRequest, arrival: Arrival
) -> tuple[Generation, "type[CompletionAnswer]"]:
    """A generation to enter and what its answer is. Raises ApiError for what the body asks."""
    settings = context.settings
    params = body.sampling()
    prompts = body.prompts()
    if len(prompts) > settings.max_prompts:
        raise ApiError(
            400, f"prompt has {len(prompts)} entries, over {settings.max_prompts}", param="prompt"
        )
    params = within_ceilings(context, params, num_prompts=len(prompts))
    _check_room(settings, len(prompts), params.n)
    structure = None
    if body.response_format is not None:
        structure = body.response_format.structure(settings.max_schema_bytes)

    def prepare(lease: Lease, unique: str) -> list[Request]:
        return [
            Request(
                id=f"{unique}-{place}",
                prompt_token_ids=prompt_ids(lease, prompt, place_of("prompt", place, prompts)),
                params=params,
                continues_text=True,
                adapter=lease.adapter,
                tenant=arrival.caller.tenant,
                priority=arrival.caller.priority,
                structure=structure,
            )
            for place, prompt in enumerate(prompts)
        ]

    accepted: Prepare = prepare
    return Generation(context, arrival, "completions", body.model, accepted), CompletionAnswer


def _check_room(settings: Settings, num_prompts: int, n: int) -> None:
    """Raises ApiError for more prompts than even an idle engine takes, which would be told to come
    again for ever. Each prompt is a request of the engine's; its choices wait and run with it."""
    copies = 1 if settings.mesh is None else parse_mesh(settings.mesh).get("data", 1)
    room = copies * (settings.queue_limit + -(-settings.max_slots // n))
    if num_prompts > room:
        of = f" of n {n}" if n > 1 else ""
        raise ApiError(
            400,
            f"prompt has {num_prompts} entries{of}; at most {room} can run and wait at once "
            f"(max_slots {settings.max_slots}, queue_limit {settings.queue_limit}); send fewer",
            param="prompt",
        )


def within_ceilings(
    context: Context, params: SamplingParams, *, num_prompts: int = 1
) -> SamplingParams:
    """The same, with no more tokens than a request may have where it did not say. Raises
    ApiError."""
    settings = context.settings
    choices = params.n * num_prompts
    if choices > settings.max_choices:
        of = f" (n {params.n} of {num_prompts} prompts)" if num_prompts > 1 else ""
        raise ApiError(
            400,
            f"{choices} choices are asked for{of}; the limit is {settings.max_choices}",
            param="n" if params.n > 1 else "prompt",
        )
    ceiling = settings.max_tokens
    if ceiling is None:
        return params
    for name in ("max_tokens", "min_tokens"):
        value = getattr(params, name)
        if value is not None and value > ceiling:
            raise ApiError(400, f"{name} is {value}; the limit is {ceiling}", param=name)
    if params.max_tokens is None and ceiling < DEFAULT_MAX_TOKENS:
        return replace(params, max_tokens=ceiling)
    return params


def place_of(field: str, place: int, entries: Sequence[Any]) -> str:
    """What an entry is called in an error: by its place where it is not the only one."""
    return f"{field}.{place}" if len(entries) > 1 else field


def prompt_ids(lease: Lease, prompt: str | list[int], field: str) -> tuple[int, ...]:
    """Token ids of a text or of ids. Raises ApiError."""
    if isinstance(prompt, list):
        ids = prompt
    elif lease.loaded.tokenizer is None:
        raise ApiError(
            400, f"{field}: {lease.loaded.name} has no tokenizer; send token ids", param=field
        )
    else:
        check_text(lease, prompt, field)
        ids = lease.loaded.tokenizer.encode(prompt)
    check_length(lease, len(ids), field)
    return tuple(ids)


def check_text(lease: Lease, text: str, field: str) -> None:
    """Raises ApiError for a text that is too long by far, before it is encoded, which takes
    seconds and a gigabyte for some megabytes."""
    assert lease.loaded.tokenizer is not None
    fewest = lease.loaded.tokenizer.fewest_tokens(text)
    _check_tokens(lease, fewest, f"at least {fewest}", field)


def check_length(lease: Lease, tokens: int, field: str) -> None:
    if not tokens:
        raise ApiError(400, f"{field} has no tokens", param=field)
    _check_tokens(lease, tokens, f"{tokens}", field)


def _check_tokens(lease: Lease, tokens: int, said: str, field: str) -> None:
    context = lease.loaded.engine.max_context
    if tokens > context:
        raise ApiError(
            400,
            f"the prompt has {said} tokens; the context of {lease.loaded.name} is {context}",
            param=field,
            code="context_length_exceeded",
        )


class CompletionAnswer(Answer):
    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, generation: Generation, **options: Any):
        super().__init__(generation, **options)
        self._choices: dict[int, Choice] = {}
        self._params = generation.requests[0].params
        # Where the next token's text begins, by choice.
        self._offsets: dict[int, int] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}

    def _number(self, prompt: int, piece: Piece) -> int:
        return prompt * self._params.n + piece.index

    def _entries(self, prompt: int, piece: Piece) -> list[TokenLogprob | None]:
        """Log probabilities that go with a piece: the echoed prompt's with the first."""
        number = self._number(prompt, piece)
        entries: list[TokenLogprob | None] = []
        if number not in self._offsets:
            self._offsets[number] = 0
            entries += self._prompt_logprobs.get(prompt, [])
        return [*entries, *piece.logprobs]

    def _started(self, prompt: int, event: Started) -> None:
        if event.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = event.prompt_logprobs

    def _chunk_choices(self, prompt: int, event: Started | Piece) -> Iterator[dict[str, Any]]:
        if isinstance(event, Started):
            self._started(prompt, event)
            return
        entries = self._entries(prompt, event)
        if not (event.text or entries or event.finish_reason):
            # Half a character or the beginning of a stop string: nothing to show yet.
            return
        yield {
            "index": self._number(prompt, event),
            "text": event.text,
            "logprobs": self._logprobs(prompt, self._number(prompt, event), entries),
            "finish_reason": event.finish_reason,
        }

    def _gather(self, prompt: int, event: Started | Piece) -> None:
        if isinstance(event, Started):
            self._started(prompt, event)
            return
        choice = self._choices.setdefault(self._number(prompt, event), Choice())
        choice.logprobs += self._entries(prompt, event)
        choice.text.append(event.text)
        choice.finish_reason = event.finish_reason or choice.finish_reason

    def _whole_choices(self) -> list[dict[str, Any]]:
        return [
            {
                "index": number,
                "text": "".join(choice.text),
                "logprobs": self._logprobs(number // self._params.n, number, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for number, choice in sorted(self._choices.items())
        ]

    def _logprobs(
        self, prompt: int, number: int, entries: list[TokenLogprob | None]
    ) -> dict[str, Any] | None:
        """OpenAI's older form: lists side by side. text_offset counts characters of the tokens."""
        wanted = self._params.logprobs
        if wanted is None:
            return None
        tokens, offsets, tops = [], [], []
        for entry in entries:
            token = self._first_token(prompt) if entry is None else token_text(entry)
            tokens.append(token)
            offsets.append(self._offsets[number])
            self._offsets[number] += len(token)
            tops.append(None if entry is None else _top(entry))
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": tops if wanted else None,
            "text_offset": offsets,
        }

    def _first_token(self, prompt: int) -> str:
        """The prompt's first token, of which no model says how likely it was."""
        tokenizer = self._generation.loaded.tokenizer
        if tokenizer is None:
            return ""
        first = self._generation.requests[prompt].prompt_token_ids[0]
        return token_text(Alternative(first, "", tokenizer.token_bytes(first), 0.0))


def _top(entry: TokenLogprob) -> dict[str, float]:
    """The most likely tokens, and the chosen one if it is not among them."""
    top = {token_text(each): each.logprob for each in entry.top}
    top.setdefault(token_text(entry), entry.logprob)
    return top
