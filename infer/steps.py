"""The compiled steps of generation: prefill a piece of prompt, take a token, score a prompt.

Module-level jitted functions of (config, params, …), so that every caller in a process shares
their compilations. The cache and the memory of seen tokens are donated: updated in place.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from infer.sampling import Needs, Rows, Sampled, Seen, sample, token_logprobs
from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import constrain
from llama_jax.model import transformer
from llama_jax.model.cache import KVCache, init_cache

# Positions whose logits over the whole vocabulary exist at one time while a prompt is scored.
# Divides every bucket of tokens.
SCORED_POSITIONS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """What holds for a whole model: ids that stand for no token, and ids that end a text."""

    allowed: Bool[Array, " V"] | None
    end_tokens: Int[Array, " E"]


@partial(jax.jit, static_argnames=("config", "compute", "batch", "capacity", "stacked"))
def new_cache(
    config: ModelConfig, *, compute: Compute, batch: int, capacity: int, stacked: bool
) -> KVCache:
    """An empty cache, its rows and heads dealt out on a mesh."""
    cache = init_cache(config, batch, capacity, dtype=compute.held_dtype, stacked=stacked)
    return _placed(cache, compute)


def _placed(cache: KVCache, compute: Compute) -> KVCache:
    """Rows and heads dealt out on the mesh in force, if any."""
    stack: tuple[str | None, ...] = ("layers",) if cache.is_stacked else ()

    def place(arrays: Any, *axes: str | None) -> Any:
        return jax.tree.map(lambda array: constrain(array, axes, compute.rules), arrays)

    return dataclasses.replace(
        cache,
        keys=place(cache.keys, *stack, "batch", "kv_heads", "head_dim", None),
        values=place(cache.values, *stack, "batch", "kv_heads", None, "head_dim"),
        positions=place(cache.positions, "batch", None),
        lengths=place(cache.lengths, "batch"),
    )


@partial(
    jax.jit,
    static_argnames=("config", "compute", "visible", "keep_hidden"),
    donate_argnames=("cache", "last"),
)
def prefill(
    config: ModelConfig,
    params: Any,
    cache: KVCache,
    last: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    num_real: Int[Array, " B"],
    *,
    compute: Compute,
    visible: int,
    keep_hidden: bool,
) -> tuple[KVCache, Float[Array, "B D"], Float[Array, "B T D"] | None]:
    """Runs a piece of every prompt, of which the first num_real[b] tokens are real (maybe none).

    last: the state of each row's last real token so far, from which its first token is drawn.
    visible: leading slots of the cache that may hold something once these tokens are in.
    """
    length = tokens.shape[1]
    segment_ids = (jnp.arange(length) < num_real[:, None]).astype(jnp.int32)
    hidden, after, _ = transformer.hidden_states(
        config,
        params,
        tokens,
        compute=compute,
        segment_ids=segment_ids,
        cache=cache,
        visible=visible,
    )
    assert after is not None
    place = jnp.maximum(num_real - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(hidden, place, axis=1)[:, 0]
    last = jnp.where((num_real > 0)[:, None], newest, last)
    last = constrain(last, ("batch", None), compute.rules)
    return _placed(after, compute), last, hidden if keep_hidden else None


@partial(jax.jit, static_argnames=("config", "compute", "needs"), donate_argnames=("seen",))
def first_token(
    config: ModelConfig,
    params: Any,
    last: Float[Array, "B D"],
    seen: Seen | None,
    rows: Rows,
    rules: Rules,
    *,
    compute: Compute,
    needs: Needs,
) -> tuple[Sampled, Seen | None]:
    """The first new token of each row, from the states that `prefill` left."""
    logits = transformer.logits(config, params, last, compute=compute)
    step = jnp.zeros(last.shape[:1], jnp.int32)
    return _take(logits, seen, rows, rules, step, compute=compute, needs=needs)


@partial(jax.jit, static_argnames=("config", "compute", "needs"), donate_argnames=("cache", "seen"))
def next_token(
    config: ModelConfig,
    params: Any,
    cache: KVCache,
    seen: Seen | None,
    tokens: Int[Array, " B"],
    step: Int[Array, " B"],
    rows: Rows,
    rules: Rules,
    *,
    compute: Compute,
    needs: Needs,
) -> tuple[KVCache, Sampled, Seen | None]:
    """Runs each row's newest token and takes the next; `step` counts the tokens it has."""
    logits, after = transformer.decode(config, params, cache, tokens[:, None], compute=compute)
    sampled, seen = _take(logits, seen, rows, rules, step, compute=compute, needs=needs)
    return _placed(after, compute), sampled, seen


def _take(
    logits: Float[Array, "B V"],
    seen: Seen | None,
    rows: Rows,
    rules: Rules,
    step: Int[Array, " B"],
    *,
    compute: Compute,
    needs: Needs,
) -> tuple[Sampled, Seen | None]:
    sampled = sample(
        logits,
        rows,
        step=step,
        needs=needs,
        seen=seen,
        allowed=rules.allowed,
        end_tokens=rules.end_tokens,
    )
    tokens = constrain(sampled.tokens, ("batch",), compute.rules)
    sampled = dataclasses.replace(sampled, tokens=tokens)
    return sampled, None if seen is None else seen.add(tokens)


@partial(jax.jit, static_argnames=("vocab_size",))
def seen_prompts(tokens: Int[Array, "B T"], lengths: Int[Array, " B"], *, vocab_size: int) -> Seen:
    return Seen.of_prompts(tokens, lengths, vocab_size=vocab_size)


@partial(jax.jit, static_argnames=("config", "compute", "num"))
def score(
    config: ModelConfig,
    params: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    compute: Compute,
    num: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T K"], Int[Array, "B T K"]]:
    """Log probability of targets[b, t] after position t, and of the `num` most likely ones."""
    batch, length, _ = hidden.shape

    def pieces(array: jax.Array) -> jax.Array:
        split = array.reshape(batch, length // SCORED_POSITIONS, SCORED_POSITIONS, *array.shape[2:])
        return split.swapaxes(0, 1)

    def one(piece: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
        states, wanted = piece
        flat = states.reshape(-1, states.shape[-1])
        logits = transformer.logits(config, params, flat, compute=compute)
        scored = token_logprobs(logits, wanted.reshape(-1), num=num)
        return [x.reshape(*wanted.shape, *x.shape[1:]) for x in scored]

    scored = jax.lax.map(one, (pieces(hidden), pieces(targets)))
    chosen, top, ids = (x.swapaxes(0, 1).reshape(batch, length, *x.shape[3:]) for x in scored)
    return chosen, top, ids
