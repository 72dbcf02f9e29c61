"""How well a model predicts sequences (loss, perplexity) and answers (exact match).

Losses are token-weighted: every counted token weighs the same, whatever row it stands in and
whichever rows share its batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.model.losses import Batch, next_token_loss

# Token ids, and which of them count.
Scored = tuple[Sequence[int], Sequence[int]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """loss: mean cross entropy in nats over `tokens` counted tokens; perplexity: e to the loss
    (infinite where that is beyond a float)."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def score(
    config: ModelConfig,
    params: tree.Tree,
    sequences: Sequence[Scored],
    *,
    compute: Compute,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> Score:
    """The loss over `sequences` of (token ids, 0/1 mask of the tokens that count).

    The first token of a sequence follows nothing and never counts. `batch_tokens` bounds how many
    tokens, padding included, run at once (one row always does). Raises ValueError for a sequence
    that is empty, longer than the context or uneven with its mask, for an id outside the
    vocabulary, and when no token counts.
    """
    for number, (ids, mask) in enumerate(sequences):
        _check(config, number, ids, mask)
    counted = sum(int(sum(mask[1:])) for _, mask in sequences)
    if counted == 0:
        raise ValueError("no token counts: every row is one token long or has an empty answer")
    total, done = 0.0, 0
    for rows in _groups(sequences, batch_tokens):
        # The float64 sum of float32 batch sums keeps long files exact.
        total += float(_loss_sum(config, compute, params, rows.batch))
        done += rows.count
        if progress is not None:
            progress(done, len(sequences))
    return Score(loss=total / counted, tokens=counted)


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The part of answers that equal what was expected, white space at the ends aside."""
    if not expected:
        raise ValueError("there is nothing to compare: no answer is expected")
    pairs = zip(answers, expected, strict=True)
    return sum(answer.strip() == wanted.strip() for answer, wanted in pairs) / len(expected)


@partial(jax.jit, static_argnums=(0, 1))
def _loss_sum(config: ModelConfig, compute: Compute, params: tree.Tree, batch: Batch) -> jax.Array:
    return next_token_loss(config, params, batch, compute=compute)[0]


def _check(config: ModelConfig, number: int, ids: Sequence[int], mask: Sequence[int]) -> None:
    where = f"sequence {number}"
    if len(ids) == 0:
        raise ValueError(f"{where} has no token")
    if len(ids) != len(mask):
        raise ValueError(f"{where} has {len(ids)} tokens and a mask of {len(mask)}")
    if len(ids) > config.max_position_embeddings:
        raise ValueError(
            f"{where} has {len(ids)} tokens, more than the context of "
            f"{config.max_position_embeddings}; split it or leave it out"
        )
    low, high = min(ids), max(ids)
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"{where} has the token id {low if low < 0 else high}, outside the vocabulary of "
            f"{config.vocab_size}"
        )


@dataclass(frozen=True)
class _Rows:
    batch: Batch
    count: int


def _groups(sequences: Sequence[Scored], batch_tokens: int) -> Iterator[_Rows]:
    """Batches of like lengths. A length is padded up to the next of 32, 48, 64, 96, 128, 192, …,
    and all batches of one length have the same number of rows, so few programs are compiled."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    start = 0
    while start < len(order):
        length = _padded_length(len(sequences[order[start]][0]))
        rows = min(max(1, batch_tokens // length), len(sequences))
        chosen = []
        for i in order[start : start + rows]:
            if len(sequences[i][0]) > length:
                break
            chosen.append(sequences[i])
        start += len(chosen)
        yield _Rows(_make_batch(chosen, rows, length), len(chosen))


def _padded_length(length: int) -> int:
    size = 32
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _make_batch(sequences: Sequence[Scored], num_rows: int, length: int) -> Batch:
    shape = (num_rows, length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segment_ids, loss_mask = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, (ids, mask) in enumerate(sequences):
        size = len(ids)
        tokens[row, :size] = ids
        targets[row, : size - 1] = ids[1:]
        loss_mask[row, : size - 1] = mask[1:]
        segment_ids[row, :size] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(tokens, targets, loss_mask, segment_ids, positions)
