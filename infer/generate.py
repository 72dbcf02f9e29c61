"""Batched generation: prompts in, texts out, whole or as they grow.

`generate` is the one call most users need; a `Generator` keeps a model ready between calls. This
file checks what is asked and deals prompts into batches; `batch.py` runs a batch.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from infer import steps
from infer.batch import Batch, Runnable
from infer.completion import Output, Piece, Row
from infer.layers import Layers, with_layers
from infer.params import SamplingParams, checked_int
from llama_jax.config import Compute, ModelConfig, require_type
from llama_jax.model.arguments import check_params

if TYPE_CHECKING:
    from llama_jax.formats.tokenizer import Tokenizer

DEFAULT_BATCH_SIZE = 32


@dataclass
class Stats:
    """Counts and wall-clock seconds of one call. Prefill ends when the first tokens are read;
    compilation, where there was any, is in the seconds too."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of the whole run; 0 when there were none."""
        return self.new_tokens / self.seconds if self.new_tokens else 0.0


class Generations(list[Output]):
    """The outputs, by prompt and then by choice, and what the run took in `stats`."""

    def __init__(self, outputs: Iterable[Output], stats: Stats):
        super().__init__(outputs)
        self.stats = stats

    @property
    def tokens_per_second(self) -> float:
        return self.stats.tokens_per_second


def generate(
    model: Any,
    prompts: Any,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    chat: bool = False,
    adapter: str | Path | None = None,
    stream: Callable[[Piece], None] | None = None,
    compute: Compute | None = None,
    mesh: jax.sharding.Mesh | None = None,
    layers: Layers = "auto",
    batch_size: int = DEFAULT_BATCH_SIZE,
    max_context: int | None = None,
    **sampling: Any,
) -> Generations:
    """Completes every prompt: `generate(model, ["Hello"], temperature=0, max_tokens=20)`.

    model: what `llama_jax.load` gives, or a tuple (config, params, tokenizer); the tokenizer may be
      None when prompts are token ids.
    prompts: a text, a list of token ids, or with `chat` a list of messages; or a list of those.
    params: `SamplingParams` for all prompts or one for each; or give its fields as keywords.
    adapter: a PEFT adapter folder to put on the model for this call.
    stream: called with each `Piece` as soon as it is known, in the order of computation.
    mesh: the mesh `params` are placed on; None for one device.
    layers, batch_size, max_context: see `Generator`.

    Raises ValueError for a parameter out of range, a prompt that is empty, too long or has ids
    outside the vocabulary.
    """
    if params is not None and sampling:
        raise ValueError(
            f"params and {', '.join(sorted(sampling))} are both given; give one or the other"
        )
    if params is None:
        params = SamplingParams.from_dict(sampling)
    nothing = type(None)
    require_type("adapter", adapter, (str, Path, nothing), "a PEFT adapter folder, or None")
    config, weights, tokenizer = parts_of(model)
    if adapter is not None:
        from llama_jax.formats.peft import load_adapter

        weights = load_adapter(adapter, config, weights)
    generator = Generator(
        config,
        weights,
        tokenizer,
        compute=compute,
        mesh=mesh,
        layers=layers,
        batch_size=batch_size,
        max_context=max_context,
    )
    return generator.generate(prompts, params, chat=chat, stream=stream)


def parts_of(model: Any) -> tuple[ModelConfig, Any, "Tokenizer | None"]:
    """(config, params, tokenizer) of a loaded model or of such a tuple."""
    if isinstance(model, tuple) and len(model) == 3:
        config, params, tokenizer = model
        return config, params, tokenizer
    if not all(hasattr(model, name) for name in ("config", "params", "tokenizer")):
        raise ValueError(
            f"model is of type {type(model).__name__}; give what load gives, or a tuple (config, "
            f"params, tokenizer)"
        )
    return model.config, model.params, model.tokenizer


class Generator:
    """A model made ready to generate.

    layers: `unrolled` runs over per-layer arrays, which on a CPU decodes 2.6 times faster;
      elsewhere these are copies unless `params` come from `layout.unstack_layers`. `scanned`
      compiles one layer. `auto` unrolls on a single CPU device and takes tuples of layers as they
      are.
    batch_size: rows (prompts times choices) computed together at most.
    max_context: tokens a prompt and its answer may have together, at most and by default
      `config.max_position_embeddings`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: "Tokenizer | None" = None,
        *,
        compute: Compute | None = None,
        mesh: jax.sharding.Mesh | None = None,
        layers: Layers = "auto",
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_context: int | None = None,
    ):
        require_type("config", config, ModelConfig, "a ModelConfig, such as model.config")
        nothing = type(None)
        allowed = "a Compute, such as Compute(dtype='bfloat16')"
        require_type("compute", compute, (Compute, nothing), allowed)
        require_type("mesh", mesh, (jax.sharding.Mesh, nothing), "a Mesh, as make_mesh makes")
        check_params(config, params)
        self.config, self.tokenizer = config, tokenizer
        self.batch_size = checked_int("batch_size", batch_size, low=1, high=65536)
        longest = config.max_position_embeddings
        self.max_context = longest
        if max_context is not None:
            self.max_context = checked_int("max_context", max_context, low=1, high=longest)
        ends = set(config.eos_token_id)
        ends |= set() if tokenizer is None else set(tokenizer.eos_token_ids)
        # A config may name ids that the model has no row for, and so never emits.
        ends = {token for token in ends if token < config.vocab_size}
        self.end_tokens = frozenset(ends)
        end_tokens: Any = np.asarray(sorted(ends), np.int32)
        rules = steps.Rules(allowed=_allowed(config, tokenizer), end_tokens=end_tokens)
        self.model = Runnable(
            config=config,
            params=with_layers(params, layers, mesh),
            compute=Compute() if compute is None else compute,
            mesh=mesh,
            rules=rules,
            tokenizer=tokenizer,
        )

    def generate(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        chat: bool = False,
        stream: Callable[[Piece], None] | None = None,
    ) -> Generations:
        if stream is not None and not callable(stream):
            raise ValueError(
                f"stream is of type {type(stream).__name__}; give a function of a Piece"
            )
        rows, stats = self.rows(prompts, params, chat=chat), Stats()
        for piece in self.run(rows, stats):
            if stream is not None:
                stream(piece)
        return Generations([row.output() for row in rows], stats)

    def stream(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        chat: bool = False,
    ) -> Iterator[Piece]:
        """The pieces as an iterator. Prompts are checked now, computed as pieces are asked for;
        closing the iterator ends the work."""
        return self.run(self.rows(prompts, params, chat=chat), Stats())

    def rows(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        chat: bool,
    ) -> list[Row]:
        """A checked row for every choice of every prompt."""
        listed = _listed(prompts, chat=chat)
        each = _each(params, len(listed))
        if len(each) != len(listed):
            raise ValueError(f"{len(each)} params are given for {len(listed)} prompts")
        rows = []
        for index, (prompt, wishes) in enumerate(zip(listed, each, strict=True)):
            ids = self.encode(prompt, chat=chat, where=f"prompt {index}")
            self.check_wishes(wishes, where=f"prompt {index}")
            seed = secrets.randbits(63) if wishes.seed is None else wishes.seed
            rows += [
                Row(
                    prompt=prompt,
                    prompt_token_ids=ids,
                    params=wishes,
                    seed=seed,
                    prompt_index=index,
                    index=choice,
                    limit=wishes.limit_tokens(len(ids), self.max_context),
                    end_tokens=self.end_tokens,
                    tokenizer=self.tokenizer,
                    continues_text=not chat,
                )
                for choice in range(wishes.n)
            ]
        return rows

    def encode(self, prompt: Any, *, chat: bool, where: str = "prompt") -> list[int]:
        """The prompt's token ids, checked against the vocabulary and the context."""
        if isinstance(prompt, str) or chat:
            if self.tokenizer is None:
                raise ValueError(f"{where} is text, but the model has no tokenizer; give token ids")
            try:
                ids = self._encode_text(prompt, chat=chat)
            except ValueError as error:
                # Of the same kind: a template's refusal stays one.
                raise type(error)(f"{where}: {error}") from error
        else:
            ids = list(prompt)
        vocab_size = self.config.vocab_size
        for token in ids:
            integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not integer or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{where} has the token id {token!r}; ids are 0 to {vocab_size - 1}"
                )
        if not ids:
            begin = self.config.bos_token_id
            # Some files write -1 where there is no such token.
            if begin is None or not 0 <= begin < vocab_size:
                raise ValueError(f"{where} is empty and the model has no begin token; give a text")
            ids = [begin]
        if len(ids) > self.max_context:
            raise ValueError(
                f"{where} has {len(ids)} tokens, but the context holds {self.max_context}; "
                f"shorten the prompt by {len(ids) - self.max_context} or more"
            )
        return [int(token) for token in ids]

    def _encode_text(self, prompt: Any, *, chat: bool) -> list[int]:
        assert self.tokenizer is not None
        if not chat:
            return list(self.tokenizer.encode(prompt))
        from llama_jax.formats.chat import encode_chat

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(encode_chat(self.tokenizer, messages, add_generation_prompt=True))

    def check_wishes(self, wishes: SamplingParams, *, where: str) -> None:
        if wishes.stop and self.tokenizer is None:
            raise ValueError(f"{where} has stop strings, but the model has no tokenizer")
        bias = wishes.logit_bias
        for token in bias:
            if token >= self.config.vocab_size:
                raise ValueError(
                    f"logit_bias of {where} names token {token}; ids are 0 to "
                    f"{self.config.vocab_size - 1}"
                )
        forbidden = [token for token, value in bias.items() if value <= -100]
        if forbidden:
            allowed = self.model.rules.allowed
            left = np.ones(self.config.vocab_size, bool) if allowed is None else allowed.copy()
            left[[*forbidden, *(self.end_tokens if wishes.min_tokens else ())]] = False
            if not left.any():
                raise ValueError(f"logit_bias of {where} forbids every token; allow at least one")

    def run(self, rows: Sequence[Row], stats: Stats) -> Iterator[Piece]:
        """Completes the rows, in batches from the longest prompt to the shortest."""
        work = [row for row in rows if row.limit > 0 or row.wants_prompt_logprobs]
        for row in rows:
            if row.limit == 0 and not row.wants_prompt_logprobs:
                yield from row.start()
        work.sort(key=lambda row: len(row.prompt_token_ids), reverse=True)
        for begin in range(0, len(work), self.batch_size):
            batch = Batch(self.model, work[begin : begin + self.batch_size])
            yield from self._timed(batch, stats)

    def _timed(self, batch: Batch, stats: Stats) -> Iterator[Piece]:
        """The batch's pieces, with the time between them counted; not the time of who reads."""
        stats.prompt_tokens += sum(len(row.prompt_token_ids) for row in batch.rows)
        pieces = batch.run()
        while True:
            began = time.perf_counter()
            piece = next(pieces, None)
            seconds = time.perf_counter() - began
            if batch.is_decoding:
                stats.decode_seconds += seconds
            else:
                stats.prefill_seconds += seconds
            if piece is None:
                return
            stats.new_tokens += len(piece.token_ids)
            yield piece


def _each(params: Any, count: int) -> list[SamplingParams]:
    """Of each of `count` prompts, from one for all or a list of them."""
    if isinstance(params, SamplingParams):
        return [params] * count
    each = list(params) if isinstance(params, Sequence) else [params]
    for wishes in each:
        require_type("params", wishes, SamplingParams, "SamplingParams, for all prompts or each")
    return each


def _listed(prompts: Any, *, chat: bool) -> list[Any]:
    """A list of prompts, from one or several."""
    if isinstance(prompts, str):
        return [prompts]
    wanted = "a list of messages" if chat else "text, token ids or a list of those"
    if isinstance(prompts, Mapping):
        raise ValueError(f"prompts is a dict with {', '.join(map(str, prompts))}; give {wanted}")
    # An array of no dimension says it can be gone through, and cannot.
    is_number = isinstance(prompts, np.ndarray) and not prompts.ndim
    if not isinstance(prompts, Iterable) or is_number or isinstance(prompts, bytes | bytearray):
        raise ValueError(f"prompts is of type {type(prompts).__name__}; give {wanted}")
    listed = list(prompts)
    single = dict | Mapping if chat else int | np.integer
    if listed and all(isinstance(each, single) for each in listed):
        return [listed]
    for index, each in enumerate(listed):
        # Bytes are a sequence of integers, but no token ids.
        if not isinstance(each, str | Sequence | np.ndarray) or isinstance(each, bytes | bytearray):
            wanted = "messages" if chat else "text or token ids"
            raise ValueError(f"prompt {index} is {each!r}; give {wanted}")
    return listed


def _allowed(config: ModelConfig, tokenizer: "Tokenizer | None") -> Any:
    """[V], False for ids that stand for no token; None when all do."""
    unused = [] if tokenizer is None else tokenizer.unused_ids(config.vocab_size)
    if not unused:
        return None
    allowed = np.ones(config.vocab_size, bool)
    allowed[unused] = False
    return allowed
