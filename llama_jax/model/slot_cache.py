"""A key/value cache of slots for continuous batching: rows come and go, each at its own length.

Every slot is contiguous. What a step reads of it is walked in tiles of `TILE` positions, as many as
the longest row in the step needs, with a running softmax. So one compiled step serves every
length, and what lies behind a row's own end adds exact zeros: its numbers do not depend on how far
its neighbours have come. (On a CPU, gathering blocks instead costs seven times the time of reading
them in place; blocks are therefore copied into slots when a prefix is shared, once.)
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import ModelConfig
from llama_jax.model.attention import MASKED, few_rows_product, many_rows_product

TILE = 256

# Up to this many tokens a row, a step's products are bound by reading the cache.
FEW_TOKENS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotRows:
    """Which slots a step runs, and where its tokens stand.

    first: [], the slot of row 0; row b is slot first + b. positions: [B, T], consecutive in each
    row; from the capacity on for rows that only fill the step up: they are not written.
    visible: [], positions of the longest row once the step's tokens are in.
    """

    first: Int[Array, ""]
    positions: Int[Array, "B T"]
    visible: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotCache:
    """For each layer keys [N, K, H, S], already rotated, and values [N, K, S, H]; `rows` says what
    the next step does with them."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    rows: SlotRows | None = None

    @property
    def capacity(self) -> int:
        return self.values[0].shape[2]


def init_slot_cache(config: ModelConfig, num_slots: int, capacity: int, *, dtype: Any) -> SlotCache:
    """Empty slots of at least `capacity` positions, a whole number of tiles."""
    capacity = -(-capacity // TILE) * TILE
    heads, size = config.num_key_value_heads, config.head_dim
    layers = range(config.num_hidden_layers)
    return SlotCache(
        keys=tuple(jnp.zeros((num_slots, heads, size, capacity), dtype) for _ in layers),
        values=tuple(jnp.zeros((num_slots, heads, capacity, size), dtype) for _ in layers),
    )


def attend_slots(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    layer: tuple[jax.Array, jax.Array],
    rows: SlotRows,
    *,
    sliding_window: int | None,
) -> tuple[Float[Array, "B T N H"], tuple[jax.Array, jax.Array]]:
    """Writes the new keys and values, then attends: (mixed values, the layer's arrays)."""
    keys, values = _write(layer, key, value, rows)
    batch, length, heads, size = query.shape
    kv_heads, capacity = keys.shape[1], keys.shape[3]
    groups = heads // kv_heads
    dtype = query.dtype
    query = query.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, groups * length, size).astype(keys.dtype)
    places = jnp.tile(rows.positions, (1, groups))[:, None, :, None]  # of the query [B, 1, G*T, 1]
    multiply = few_rows_product if length <= FEW_TOKENS else many_rows_product
    offsets = jnp.arange(TILE, dtype=jnp.int32)

    def tile(index: jax.Array, carry: Any) -> Any:
        largest, total, mixed = carry
        begin = index * TILE
        seen = jax.lax.dynamic_slice(keys, (rows.first, 0, 0, begin), (batch, kv_heads, size, TILE))
        held = jax.lax.dynamic_slice(
            values, (rows.first, 0, begin, 0), (batch, kv_heads, TILE, size)
        )
        scores = multiply(query, seen) * size**-0.5
        mask = begin + offsets <= places
        if sliding_window is not None:
            mask &= begin + offsets > places - sliding_window
        scores = jnp.where(mask, scores, MASKED)
        larger = jnp.maximum(largest, scores.max(axis=-1))
        kept = jnp.exp(largest - larger)
        weights = jnp.exp(scores - larger[..., None])
        total = total * kept + weights.sum(axis=-1)
        added = multiply(weights.astype(held.dtype), held)
        return larger, total, mixed * kept[..., None] + added

    shape = (batch, kv_heads, groups * length)
    start = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, size), jnp.float32),
    )
    num_tiles = jnp.minimum((rows.visible + TILE - 1) // TILE, capacity // TILE)
    _, total, mixed = jax.lax.fori_loop(0, num_tiles, tile, start)
    mixed = (mixed / total[..., None]).astype(dtype)
    mixed = mixed.reshape(batch, kv_heads, groups, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, size), (keys, values)


def _write(
    layer: tuple[jax.Array, jax.Array], key: jax.Array, value: jax.Array, rows: SlotRows
) -> tuple[jax.Array, jax.Array]:
    """One row is one slice; several rows are at places of their own."""
    keys, values = layer
    key, value = key.astype(keys.dtype), value.astype(values.dtype)
    if key.shape[0] == 1:
        begin = rows.positions[0, 0]
        keys = jax.lax.dynamic_update_slice(
            keys, key.transpose(0, 2, 3, 1), (rows.first, 0, 0, begin)
        )
        values = jax.lax.dynamic_update_slice(
            values, value.transpose(0, 2, 1, 3), (rows.first, 0, begin, 0)
        )
        return keys, values
    slots = (rows.first + jnp.arange(key.shape[0], dtype=jnp.int32))[:, None]
    keys = keys.at[slots, :, :, rows.positions].set(key, mode="drop", unique_indices=True)
    values = values.at[slots, :, rows.positions].set(value, mode="drop", unique_indices=True)
    return keys, values


def copy_slot(cache: SlotCache, source: Int[Array, ""], target: Int[Array, ""]) -> SlotCache:
    """The cache with one slot's content in another's place, too."""

    def copy(array: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(array, source, 0)
        return jax.lax.dynamic_update_index_in_dim(array, one, target, 0)

    return _mapped(cache, copy, copy)


def read_slot(cache: SlotCache, slot: Int[Array, ""]) -> list[tuple[jax.Array, jax.Array]]:
    """(keys [K, H, S], values [K, S, H]) of each layer."""
    return [
        (
            jax.lax.dynamic_index_in_dim(keys, slot, 0, keepdims=False),
            jax.lax.dynamic_index_in_dim(values, slot, 0, keepdims=False),
        )
        for keys, values in zip(cache.keys, cache.values, strict=True)
    ]


def write_slot(
    cache: SlotCache, slot: Int[Array, ""], content: list[tuple[jax.Array, jax.Array]]
) -> SlotCache:
    """Puts back what `read_slot` took out."""
    put = jax.lax.dynamic_update_index_in_dim
    return dataclasses.replace(
        cache,
        keys=tuple(put(a, new, slot, 0) for a, (new, _) in zip(cache.keys, content, strict=True)),
        values=tuple(
            put(a, new, slot, 0) for a, (_, new) in zip(cache.values, content, strict=True)
        ),
    )


def _mapped(cache: SlotCache, of_keys: Any, of_values: Any) -> SlotCache:
    return dataclasses.replace(
        cache, keys=tuple(map(of_keys, cache.keys)), values=tuple(map(of_values, cache.values))
    )


# Blocks: the same content cut into pieces of a few positions, kept for other rows to begin with.


def init_blocks(
    config: ModelConfig, num_blocks: int, block_size: int, *, dtype: Any
) -> list[tuple[jax.Array, jax.Array]]:
    """For each layer keys [blocks, K, H, block] and values [blocks, K, block, H]."""
    heads, size = config.num_key_value_heads, config.head_dim
    return [
        (
            jnp.zeros((num_blocks, heads, size, block_size), dtype),
            jnp.zeros((num_blocks, heads, block_size, size), dtype),
        )
        for _ in range(config.num_hidden_layers)
    ]


def save_blocks(
    blocks: list[tuple[jax.Array, jax.Array]],
    cache: SlotCache,
    slot: Int[Array, ""],
    ids: Int[Array, " M"],
    begin: Int[Array, ""],
    end: Int[Array, ""],
) -> list[tuple[jax.Array, jax.Array]]:
    """Copies blocks number begin to end - 1 of a slot to the places ids[begin:end]."""
    size = blocks[0][1].shape[2]

    def one(number: jax.Array, blocks: Any) -> Any:
        out = []
        for (keys, values), of_keys, of_values in zip(
            blocks, cache.keys, cache.values, strict=True
        ):
            key = jax.lax.dynamic_slice(of_keys, (slot, 0, 0, number * size), (1, *keys.shape[1:]))
            value = jax.lax.dynamic_slice(
                of_values, (slot, 0, number * size, 0), (1, *values.shape[1:])
            )
            place = (ids[number], 0, 0, 0)
            out.append(
                (
                    jax.lax.dynamic_update_slice(keys, key, place),
                    jax.lax.dynamic_update_slice(values, value, place),
                )
            )
        return out

    return jax.lax.fori_loop(begin, end, one, blocks)


def load_blocks(
    cache: SlotCache,
    blocks: list[tuple[jax.Array, jax.Array]],
    slot: Int[Array, ""],
    ids: Int[Array, " M"],
    end: Int[Array, ""],
) -> SlotCache:
    """Fills the beginning of a slot from the blocks ids[:end]."""
    size = blocks[0][1].shape[2]

    def one(number: jax.Array, layers: Any) -> Any:
        out = []
        for (keys, values), (of_keys, of_values) in zip(layers, blocks, strict=True):
            key = jax.lax.dynamic_index_in_dim(of_keys, ids[number], 0)
            value = jax.lax.dynamic_index_in_dim(of_values, ids[number], 0)
            out.append(
                (
                    jax.lax.dynamic_update_slice(keys, key, (slot, 0, 0, number * size)),
                    jax.lax.dynamic_update_slice(values, value, (slot, 0, number * size, 0)),
                )
            )
        return out

    layers = jax.lax.fori_loop(0, end, one, list(zip(cache.keys, cache.values, strict=True)))
    return dataclasses.replace(
        cache, keys=tuple(k for k, _ in layers), values=tuple(v for _, v in layers)
    )
