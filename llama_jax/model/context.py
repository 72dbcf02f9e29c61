"""What layers share of the tokens they run, of whole sequences or behind what a cache holds."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import LogicalRules, ModelConfig
from llama_jax.mesh.sequence import balanced_places, from_balanced, length_parts
from llama_jax.model import rope
from llama_jax.model.attention import causal_mask
from llama_jax.model.cache import KVCache
from llama_jax.model.paged_cache import PagedCache
from llama_jax.model.slot_cache import SlotCache, SlotRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer needs and none owns: rotary angles, who sees whom (as a mask, and as the
    segment ids it came from, which kernels take), which tokens are real, and, with a cache, the
    slot where the new keys go; with a cache of slots, `rows` says all that the mask and the cursor
    say else."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: jax.Array
    real: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    cursor: Int[Array, ""] | None
    rows: SlotRows | None = None


def sequence_context(
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    rules: LogicalRules,
) -> Context:
    """Without a cache; where the mesh divides sequences, all is in balanced order."""
    batch, length = tokens.shape
    places = key_places = jnp.arange(length, dtype=jnp.int32)[None]
    key_segments = segment_ids
    if positions is None:
        positions = positions_of(tokens, segment_ids)
    if segment_ids is not None:
        positions = jnp.where(segment_ids > 0, positions, 0)  # padding is no length
    if (parts := length_parts(rules)) > 1:
        # Queries are in balanced order, keys, gathered, in that of the text.
        places = jnp.asarray(balanced_places(length, parts))[None]
        key_segments = None if segment_ids is None else from_balanced(segment_ids, rules)
    mask = causal_mask(
        places,
        key_places,
        sliding_window=config.sliding_window,
        query_segments=segment_ids,
        key_segments=key_segments,
    )
    cos, sin = rope.angles(config, jnp.broadcast_to(positions, (batch, length)))
    real = _real(tokens, segment_ids)
    return Context(cos=cos, sin=sin, mask=mask, real=real, segment_ids=segment_ids, cursor=None)


def cached_context(
    config: ModelConfig,
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    cache: KVCache,
    visible: int | None,
) -> tuple[Context, KVCache]:
    """With the cache, advanced past these tokens but for the keys and values that layers write."""
    real = _real(tokens, segment_ids)
    positions, after = cache.extend(real.astype(jnp.int32))
    mask = causal_mask(
        positions, after.positions[:, :visible], sliding_window=config.sliding_window
    )
    # Padding must not count where angles depend on a row's length.
    cos, sin = rope.angles(config, jnp.minimum(positions, after.lengths[:, None] - 1))
    context = Context(cos=cos, sin=sin, mask=mask, real=real, segment_ids=None, cursor=cache.cursor)
    return context, after


def slot_context(config: ModelConfig, tokens: jax.Array, cache: SlotCache) -> Context:
    assert cache.rows is not None
    # Padding must not count where angles depend on a row's length.
    positions = jnp.minimum(cache.rows.positions, cache.rows.visible - 1)
    return dataclasses.replace(_served_context(config, tokens, positions), rows=cache.rows)


def paged_context(config: ModelConfig, tokens: jax.Array, cache: PagedCache) -> Context:
    assert cache.rows is not None
    positions = jnp.minimum(cache.rows.positions, cache.rows.ends[:, None] - 1)
    return _served_context(config, tokens, positions)


def _served_context(config: ModelConfig, tokens: jax.Array, positions: jax.Array) -> Context:
    """Where the cache knows who sees whom."""
    cos, sin = rope.angles(config, positions)
    real = _real(tokens, None)
    nothing = jnp.zeros((0,), bool)
    return Context(cos=cos, sin=sin, mask=nothing, real=real, segment_ids=None, cursor=None)


def _real(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    if segment_ids is None:
        return jnp.ones(tokens.shape, jnp.float32)
    return (segment_ids > 0).astype(jnp.float32)


def positions_of(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The place of each token in its segment, or in its row where there are none: [B, T]."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return places if segment_ids is None else restarted_positions(segment_ids)


def restarted_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that begin at 0 in each run of equal segment ids: [1,1,2,2,2] -> [0,1,0,1,2]."""
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    new = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.concatenate([jnp.ones_like(new[:, :1]), new], axis=1)
    begins = jax.lax.cummax(jnp.where(first, places, 0), axis=1)
    return places - begins
