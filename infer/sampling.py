"""From logits to the next token: small pure pieces, each row by itself, in a fixed order.

The order, all in float32 whatever the logits' dtype:

1. log probabilities to report are taken from the untouched logits;
2. `edit`: repetition penalty, frequency and presence penalties, logit bias, bans;
3. greedy rows take the largest logit, the lowest id among equals;
4. the others: temperature, then top-k, then top-p of what is left, then min-p (the order of
   transformers), then one draw.

Rows never mix. A row's draw depends on its seed, its choice number and its step, never on its slot,
its neighbours or the time. Parameters are arrays with an entry a row, so new values compile
nothing; `Needs` names the few variants that are compiled separately.

Ties: top-k keeps exactly k tokens and top-p the shortest prefix of the order (larger logit first,
lower id first), so that top_k = 1 and top_p = 0 are greedy even when bfloat16 logits repeat.

No vocabulary is ever sorted, which costs more than a small model's whole step on a CPU. When the
filters leave fewer than `CANDIDATES` tokens, a partial selection finds them; otherwise a search
over the bits of the threshold does. Each row takes whichever way its own logits ask for.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from infer.params import GREEDY_BELOW, MAX_TOP_LOGPROBS, SamplingParams

__all__ = ["Needs", "Rows", "SamplingParams", "Seen", "filtered_logits", "sample"]

CANDIDATES = 256

# What a row gets when no token can be chosen: a NaN or infinite logit, or everything banned.
NO_TOKEN = -1

_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class Needs:
    """What a compiled step can do; the cheaper ones leave out whole passes over the vocabulary.

    sample: some row draws (else every row is greedy). edit: some row has penalties, biases or a
    minimum length, and the arrays that remember tokens exist. top_logprobs: None for no log
    probabilities, 0 for the chosen token's, else also this many alternatives.
    """

    sample: bool
    edit: bool
    top_logprobs: int | None

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Self:
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        # One variant for every number of alternatives; the caller cuts the list.
        top = None if not wanted else MAX_TOP_LOGPROBS if max(wanted) else 0
        return cls(
            sample=not all(p.is_greedy for p in params),
            edit=any(p.edits_logits for p in params),
            top_logprobs=top,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """`SamplingParams` as arrays, one entry a row. `seed` holds the two halves of a 64-bit seed;
    `bias` is None unless the step edits logits."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition: Float[Array, " B"]
    frequency: Float[Array, " B"]
    presence: Float[Array, " B"]
    min_tokens: Int[Array, " B"]
    seed: UInt32[Array, "B 2"]
    choice: Int[Array, " B"]
    bias: Float[Array, "B V"] | None

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        *,
        seeds: Sequence[int],
        choices: Sequence[int],
        vocab_size: int,
        needs: Needs,
    ) -> Self:
        """Host arrays. `seeds` are the requests' own or, where they have none, drawn ones."""

        def column(dtype: Any, values: Sequence[Any]) -> Any:
            return np.asarray(values, dtype)

        bias: Any = None
        if needs.edit:
            bias = np.zeros((len(params), vocab_size), np.float32)
            for row, each in enumerate(params):
                for token, value in each.logit_bias.items():
                    bias[row, token] = -np.inf if value <= -100 else value
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        return cls(
            temperature=column(np.float32, [0.0 if p.is_greedy else p.temperature for p in params]),
            top_k=column(np.int32, top_k),
            top_p=column(np.float32, [p.top_p for p in params]),
            min_p=column(np.float32, [p.min_p for p in params]),
            repetition=column(np.float32, [p.repetition_penalty for p in params]),
            frequency=column(np.float32, [p.frequency_penalty for p in params]),
            presence=column(np.float32, [p.presence_penalty for p in params]),
            min_tokens=column(np.int32, [min(p.min_tokens, 2**31 - 1) for p in params]),
            seed=column(np.uint32, [((s >> 32) % 2**32, s % 2**32) for s in seeds]),
            choice=column(np.int32, choices),
            bias=bias,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """The tokens of each row so far: whether in the prompt, and how often in the output."""

    prompt: Bool[Array, "B V"]
    output: Int[Array, "B V"]

    @classmethod
    def of_prompts(
        cls, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], *, vocab_size: int
    ) -> Self:
        """Padding, the tokens from `lengths` on, does not count."""
        batch, length = tokens.shape
        real = jnp.arange(length) < lengths[:, None]
        rows = jnp.broadcast_to(jnp.arange(batch)[:, None], tokens.shape)
        prompt = jnp.zeros((batch, vocab_size), bool).at[rows, tokens].max(real)
        return cls(prompt, jnp.zeros((batch, vocab_size), jnp.int32))

    def add(self, tokens: Int[Array, " B"]) -> "Seen":
        rows = jnp.arange(tokens.shape[0])
        return dataclasses.replace(self, output=self.output.at[rows, tokens].add(1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """tokens: [B], -1 where none could be chosen. With log probabilities: `logprob` [B] of the
    chosen token, and `top_logprobs`, `top_tokens` [B, K], most likely first; else None."""

    tokens: Int[Array, " B"]
    logprob: Float[Array, " B"] | None
    top_logprobs: Float[Array, "B K"] | None
    top_tokens: Int[Array, "B K"] | None


def sample(
    logits: Float[Array, "B V"],
    rows: Rows,
    *,
    step: Int[Array, " B"],
    needs: Needs,
    seen: Seen | None,
    allowed: Bool[Array, " V"] | None,
    end_tokens: Int[Array, " E"],
) -> Sampled:
    """The next token of each row, after `step[b]` tokens of output.

    seen and `rows.bias` must be given when `needs.edit`; `allowed` is False for ids that no text
    has, None when there are none.
    """
    logits = logits.astype(jnp.float32)
    edited = logits
    if needs.edit:
        assert seen is not None
        edited = edit(logits, rows, step=step, seen=seen, end_tokens=end_tokens)
    if allowed is not None:
        edited = jnp.where(allowed, edited, _NEGATIVE_INFINITY)
    best, tokens = largest(edited)
    if needs.sample:
        drawn = draw(edited, rows, step=step)
        tokens = jnp.where(rows.temperature < GREEDY_BELOW, tokens, drawn)
    # A maximum does not show a NaN on every backend: XLA's for CPUs passes over it.
    has_nan = jnp.isnan(logits).any(axis=-1)
    tokens = jnp.where(jnp.isfinite(best) & ~has_nan, tokens, NO_TOKEN)
    logprob, top_logprobs, top_tokens = None, None, None
    if needs.top_logprobs is not None:
        logprob, top_logprobs, top_tokens = token_logprobs(logits, tokens, num=needs.top_logprobs)
    return Sampled(tokens, logprob, top_logprobs, top_tokens)


def largest(logits: Float[Array, "B V"]) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """The largest value of each row and the lowest id that has it.

    Two plain reductions: on a CPU they take a fifth of argmax's time.
    """
    best = logits.max(axis=-1)
    vocab_size = logits.shape[-1]
    ids = jnp.arange(vocab_size, dtype=jnp.int32)
    token = jnp.where(logits == best[:, None], ids, vocab_size - 1).min(axis=-1)
    return best, token


def edit(
    logits: Float[Array, "B V"],
    rows: Rows,
    *,
    step: Int[Array, " B"],
    seen: Seen,
    end_tokens: Int[Array, " E"],
) -> Float[Array, "B V"]:
    """Penalties on the model's logits, then the bias, then the ban of end tokens while a row is
    shorter than its minimum. The repetition penalty is CTRL's (Keskar et al. 2019), the other
    two are OpenAI's."""

    def each(column: jax.Array) -> jax.Array:
        return column[:, None]

    repeated = seen.prompt | (seen.output > 0)
    scaled = jnp.where(logits > 0, logits / each(rows.repetition), logits * each(rows.repetition))
    logits = jnp.where(repeated, scaled, logits)
    logits -= each(rows.frequency) * seen.output.astype(jnp.float32)
    logits -= each(rows.presence) * (seen.output > 0).astype(jnp.float32)
    assert rows.bias is not None
    logits += rows.bias
    barred = jnp.zeros(logits.shape[-1], bool).at[end_tokens].set(True)
    return jnp.where(barred & each(step < rows.min_tokens), _NEGATIVE_INFINITY, logits)


def scaled_logits(logits: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """(logits - largest) / temperature: at most 0, finite for every temperature.

    Greedy rows use 1, so that they stay free of NaN; their draw is not used.
    """
    best = logits.max(axis=-1, keepdims=True)
    temperature = jnp.where(rows.temperature < GREEDY_BELOW, 1.0, rows.temperature)
    return (logits - best) / temperature[:, None]


def filtered_logits(logits: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """Logits after temperature and the filters, -inf where a token is out.

    A softmax over them is the distribution that `draw` draws from.
    """
    scaled = scaled_logits(logits.astype(jnp.float32), rows)
    return jnp.where(_survivors(scaled, rows), scaled, _NEGATIVE_INFINITY)


def draw(
    logits: Float[Array, "B V"], rows: Rows, *, step: Int[Array, " B"], candidates: int = CANDIDATES
) -> Int[Array, " B"]:
    """One token a row from `filtered_logits`.

    Each token has its own random number, and the largest sum of filtered logit and Gumbel noise
    wins, so the two ways to find the survivors draw the same token.
    """
    vocab_size = logits.shape[-1]
    scaled = scaled_logits(logits, rows)
    bits = _bits(rows, step, vocab_size=vocab_size)
    values, ids = jax.lax.top_k(scaled, min(candidates, vocab_size))
    kept, settled = _candidate_survivors(scaled, values, rows)
    score = values + _gumbel(jnp.take_along_axis(bits, ids, axis=-1))
    score = jnp.where(kept, score, _NEGATIVE_INFINITY)
    best = score.max(axis=-1, keepdims=True)
    few = jnp.where(score == best, ids, vocab_size).min(axis=-1)

    def search() -> jax.Array:
        kept = _survivors(scaled, rows)
        _, many = largest(jnp.where(kept, scaled + _gumbel(bits), _NEGATIVE_INFINITY))
        return jnp.where(settled, few, many)

    greedy = rows.temperature < GREEDY_BELOW
    return jax.lax.cond(jnp.all(settled | greedy), lambda: few, search)


def token_logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], *, num: int
) -> tuple[Float[Array, " B"], Float[Array, "B K"], Int[Array, "B K"]]:
    """Log probabilities of `tokens` and of the `num` most likely ones, with their ids."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(num, logits.shape[-1]))
    return chosen, top_logprobs, top_tokens


def _bits(rows: Rows, step: Int[Array, " B"], *, vocab_size: int) -> UInt32[Array, "B V"]:
    """A random number for each token: from the row's seed, then choice, then step folded in.

    Counters, no state: a restarted server continues a request exactly where it was.
    """

    def one(seed: jax.Array, choice: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, choice), step)
        return jax.random.bits(key, (vocab_size,), jnp.uint32)

    return jax.vmap(one)(rows.seed, rows.choice, step)


def _gumbel(bits: UInt32[Array, "B C"]) -> Float[Array, "B C"]:
    """Standard Gumbel noise, with all 32 bits on the side where a rare token wins."""
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _candidate_survivors(
    scaled: Float[Array, "B V"], values: Float[Array, "B C"], rows: Rows
) -> tuple[Bool[Array, "B C"], Bool[Array, " B"]]:
    """Who of the C largest survives, and whether that is certainly everyone who does."""
    num, vocab_size = values.shape[-1], scaled.shape[-1]
    rank = jnp.arange(num, dtype=jnp.int32)
    weights = jnp.exp(values)
    in_top_k = rank < rows.top_k[:, None]
    top_k_settles = rows.top_k <= num
    kept_mass = jnp.where(in_top_k, weights, 0.0).sum(axis=-1)
    mass = jnp.where(top_k_settles, kept_mass, jnp.exp(scaled).sum(axis=-1))
    target = _target_mass(rows, mass)
    before = jnp.pad(jnp.cumsum(weights, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    in_top_p = (before < target[:, None]) | (rows.top_p >= 1)[:, None]
    # A top-k larger than the candidates leaves the mass that top-p takes its share of unknown.
    mass_is_known = top_k_settles | (rows.top_k >= vocab_size) | (rows.top_p >= 1)
    top_p_settles = (rows.top_p < 1) & (weights.sum(axis=-1) >= target)
    min_p_settles = weights[:, -1] < rows.min_p
    kept = in_top_k & in_top_p & (weights >= rows.min_p[:, None])
    everyone = jnp.full(scaled.shape[:1], num == vocab_size)
    return kept, everyone | top_k_settles | (mass_is_known & (top_p_settles | min_p_settles))


def _survivors(scaled: Float[Array, "B V"], rows: Rows) -> Bool[Array, "B V"]:
    """Top-k, then top-p of what top-k left, then min-p, by search over the whole vocabulary."""
    weights = jnp.exp(scaled)
    vocab_size = scaled.shape[-1]

    def top_k() -> jax.Array:
        ones = jnp.ones_like(scaled)
        return (
            _prefix(scaled, ones, rows.top_k.astype(jnp.float32))
            | (rows.top_k >= vocab_size)[:, None]
        )

    def top_p(kept: jax.Array) -> jax.Array:
        left = jnp.where(kept, weights, 0.0)
        target = _target_mass(rows, left.sum(axis=-1))
        return kept & (_prefix(scaled, left, target) | (rows.top_p >= 1)[:, None])

    everyone = jnp.ones(scaled.shape, bool)
    kept = jax.lax.cond(jnp.any(rows.top_k < vocab_size), top_k, lambda: everyone)
    kept = jax.lax.cond(jnp.any(rows.top_p < 1), top_p, lambda kept: kept, kept)
    return kept & (weights >= rows.min_p[:, None]) & (scaled > _NEGATIVE_INFINITY)


def _target_mass(rows: Rows, mass: Float[Array, " B"]) -> Float[Array, " B"]:
    """The mass a row's prefix must reach; a positive one, so that at least one token is kept."""
    return jnp.maximum(rows.top_p * mass, jnp.finfo(jnp.float32).tiny)


def _prefix(
    scaled: Float[Array, "B V"], weights: Float[Array, "B V"], target: Float[Array, " B"]
) -> Bool[Array, "B V"]:
    """The shortest prefix, in the order (larger value, lower id), whose weights reach `target`.

    Equal values must have equal weights, or 0. A bit at a time, this finds the largest threshold
    whose values from it up reach the target, then lets in as many of those equal to it as needed.
    """
    order = _sortable(scaled)

    def reached(threshold: jax.Array) -> jax.Array:
        return jnp.where(order >= threshold[:, None], weights, 0.0).sum(axis=-1) >= target

    def bit(index: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(reached(higher), higher, threshold)

    lowest = jnp.zeros(scaled.shape[:1], jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, bit, lowest)[:, None]
    above, tied = order > threshold, order == threshold
    missing = target - jnp.where(above, weights, 0.0).sum(axis=-1)
    each = jnp.where(tied, weights, 0.0).max(axis=-1)
    counted = tied & (weights > 0)
    wanted = jnp.maximum(jnp.ceil(missing / jnp.maximum(each, jnp.finfo(jnp.float32).tiny)), 1.0)
    are_all = counted.sum(axis=-1).astype(jnp.float32) <= wanted

    def lowest_ids() -> jax.Array:
        rank = jnp.cumsum(counted.astype(jnp.int32), axis=-1).astype(jnp.float32)
        return above | (counted & (rank <= wanted[:, None]))

    return jax.lax.cond(jnp.all(are_all), lambda: above | counted, lowest_ids)


def _sortable(values: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of the floats (both zeros are one)."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    sign = jnp.uint32(1) << 31
    return jnp.where(bits >= sign, ~bits, bits | sign)
