"""Runs one batch of rows: prefill, then a token a step, until every row is done.

Prompts are padded on the right up to one of a few sizes (`buckets.py`), rows up to a few numbers of
rows, so that new lengths compile nothing. A long prompt runs in pieces of `PREFILL_TOKENS`. Then
one dispatch a token. The host reads a step's tokens while the next step runs, but the first before
there is one, so a batch may compute one step that nobody reads. Rows that are done ride along
unread until all are.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from infer import steps
from infer.buckets import row_bucket, token_bucket
from infer.completion import Piece, Row
from infer.params import SamplingParams
from infer.sampling import NO_TOKEN, Needs, Rows, Sampled, Seen
from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import partition_spec
from llama_jax.model.cache import KVCache

if TYPE_CHECKING:
    from llama_jax.formats.tokenizer import Tokenizer

PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Runnable:
    """All that the compiled steps need of a model."""

    config: ModelConfig
    params: Any
    compute: Compute
    mesh: jax.sharding.Mesh | None
    rules: steps.Rules
    tokenizer: "Tokenizer | None"

    @property
    def is_stacked(self) -> bool:
        return isinstance(self.params["layers"], dict)

    @property
    def row_parts(self) -> int:
        """Devices that share the rows of a batch."""
        if self.mesh is None:
            return 1
        names = partition_spec(("batch",), self.compute.rules)[0] or ()
        names = (names,) if isinstance(names, str) else names
        return math.prod(self.mesh.shape[name] for name in names)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Where activations may be pinned to the mesh; around dispatches only, never a yield."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _scales_by_length(config: ModelConfig) -> bool:
    """Whether a prompt's length changes its rotary angles, so that it must not run in pieces."""
    return config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic"


class Batch:
    """Rows that are computed together. `run` may be called once."""

    def __init__(self, model: Runnable, rows: Sequence[Row]):
        self.model, self.rows = model, list(rows)
        self.is_decoding = False
        self._needs = Needs.of([row.params for row in rows])
        self._num_steps = max(row.limit for row in rows)
        lengths = [len(row.prompt_token_ids) for row in rows]
        longest = max(lengths)
        self._piece_tokens = token_bucket(longest)
        if not _scales_by_length(model.config):
            self._piece_tokens = min(self._piece_tokens, PREFILL_TOKENS)
        padded = -(-longest // self._piece_tokens) * self._piece_tokens
        # All rows write at one cursor, so padding takes slots of the cache too.
        self._capacity = token_bucket(padded + self._num_steps)
        # Rows that only fill the batch up hold one token and are never read.
        size = row_bucket(len(rows), multiple_of=model.row_parts)
        self._lengths = np.ones(size, np.int32)
        self._lengths[: len(rows)] = lengths
        self._tokens = np.zeros((size, padded), np.int32)
        for tokens, row in zip(self._tokens, rows, strict=False):
            tokens[: len(row.prompt_token_ids)] = row.prompt_token_ids
        self._columns = self._make_columns(size)

    def _make_columns(self, size: int) -> Rows:
        filling = size - len(self.rows)
        return Rows.of(
            [row.params for row in self.rows] + [SamplingParams(temperature=0)] * filling,
            seeds=[row.seed for row in self.rows] + [0] * filling,
            choices=[row.index for row in self.rows] + [0] * filling,
            vocab_size=self.model.config.vocab_size,
            needs=self._needs,
        )

    def run(self) -> Iterator[Piece]:
        """Every piece of every row, as it becomes known."""
        model, needs = self.model, self._needs
        shared = {"compute": model.compute, "needs": needs}
        with model.context():
            columns, rules = jax.device_put((self._columns, model.rules))
            cache, last = self._prefill()
            seen = self._seen()
            sampled, seen = steps.first_token(
                model.config, model.params, last, seen, columns, rules, **shared
            )
        for row in self.rows:
            yield from row.start()
        if self._num_steps == 0:
            return
        # Before the first step, which may have to be compiled or loaded.
        yield from self._read(sampled)
        self.is_decoding = True
        for step in range(1, self._num_steps):
            if self._is_over:
                return
            count = np.full(len(self._lengths), step, np.int32)
            with model.context():
                cache, upcoming, seen = steps.next_token(
                    model.config,
                    model.params,
                    cache,
                    seen,
                    sampled.tokens,
                    count,
                    columns,
                    rules,
                    **shared,
                )
            if step > 1:
                yield from self._read(sampled)
            sampled = upcoming
        if self._num_steps > 1 and not self._is_over:
            yield from self._read(sampled)

    @property
    def _is_over(self) -> bool:
        return all(row.finish_reason is not None for row in self.rows)

    def _prefill(self) -> tuple[KVCache, jax.Array]:
        """The filled cache and the state of each row's last prompt token [B, D]."""
        model, size = self.model, len(self._lengths)
        shared: dict[str, Any] = {"compute": model.compute}
        cache = steps.new_cache(
            model.config, batch=size, capacity=self._capacity, stacked=model.is_stacked, **shared
        )
        dtype = jnp.dtype(model.compute.dtype)
        last = jnp.zeros((size, model.config.hidden_size), dtype)
        wanted = any(row.wants_prompt_logprobs for row in self.rows)
        scores = []
        for begin in range(0, self._tokens.shape[1], self._piece_tokens):
            end = begin + self._piece_tokens
            real = np.clip(self._lengths - begin, 0, self._piece_tokens)
            cache, last, hidden = steps.prefill(
                model.config,
                model.params,
                cache,
                last,
                self._tokens[:, begin:end],
                real,
                visible=min(token_bucket(end), self._capacity),
                keep_hidden=wanted,
                **shared,
            )
            if wanted:
                targets = np.zeros((size, self._piece_tokens), np.int32)
                following = self._tokens[:, begin + 1 : end + 1]
                targets[:, : following.shape[1]] = following
                num = self._needs.top_logprobs
                assert hidden is not None and num is not None
                scored = steps.score(model.config, model.params, hidden, targets, num=num, **shared)
                scores.append(jax.device_get(scored))
        if wanted:
            self._score_prompts(
                *(np.concatenate(each, axis=1) for each in zip(*scores, strict=True))
            )
        return cache, last

    def _seen(self) -> Seen | None:
        if not self._needs.edit:
            return None
        vocab_size = self.model.config.vocab_size
        return steps.seen_prompts(self._tokens, self._lengths, vocab_size=vocab_size)

    def _score_prompts(
        self, logprobs: np.ndarray, top_logprobs: np.ndarray, top_tokens: np.ndarray
    ) -> None:
        for index, row in enumerate(self.rows):
            if row.wants_prompt_logprobs:
                ids = row.prompt_token_ids
                row.prompt_logprobs = [None]
                row.prompt_logprobs += [
                    row.scored(
                        token,
                        logprobs[index, place],
                        top_logprobs[index, place],
                        top_tokens[index, place],
                    )
                    for place, token in enumerate(ids[1:])
                ]

    def _read(self, sampled: Sampled) -> Iterator[Piece]:
        """Waits for a step's tokens and hands them to the rows that are not done."""
        step: Sampled = jax.device_get(sampled)
        for index, row in enumerate(self.rows):
            if row.finish_reason is not None:
                continue
            token = int(step.tokens[index])
            if token == NO_TOKEN:
                raise FloatingPointError(
                    f"prompt {row.prompt_index}: no token can be chosen after "
                    f"{len(row.token_ids)} new tokens, because logits are NaN or infinite, or "
                    f"every token is forbidden; check the weights, compute.dtype "
                    f"({self.model.compute.dtype}) and logit_bias"
                )
            yield row.push(token, row.logprob_of(step, index))
