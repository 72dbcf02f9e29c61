"""A key/value cache of slots for continuous batching: rows come and go, each at its own length.

Every slot is contiguous. What a step reads of it is walked in tiles of `TILE` positions, as many as
the longest row in the step needs, with a running softmax. So one compiled step serves every
length, and what lies behind a row's own end adds exact zeros: its numbers do not depend on how far
its neighbours have come. (On a CPU, gathering blocks instead costs seven times the time of reading
them in place; blocks are therefore copied into slots when a prefix is shared, once.)
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.config import ModelConfig
from llama_jax.kernels.few_rows import FEW_TOKENS, MASKED, few_rows_product, many_rows_product
from llama_jax.kernels.rounded import Held, as_held, empty, scaled, unscaled

TILE = 256

# Rows whose tiles are read together. On a CPU a tile is copied before it is used: those of eight
# rows stay in its caches, those of 32 take twice the time.
_TOGETHER = 8


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
    the next step does with them. Rounded ones hold two arrays with these axes."""

    keys: tuple[Held, ...]
    values: tuple[Held, ...]
    rows: SlotRows | None = None

    @property
    def capacity(self) -> int:
        return self.values[0].shape[2]


def init_slot_cache(config: ModelConfig, num_slots: int, capacity: int, *, dtype: str) -> SlotCache:
    """Empty slots of at least `capacity` positions, a whole number of tiles; dtype: a float's name,
    or int8."""
    layers = _empty_layers(config, num_slots, -(-capacity // TILE) * TILE, dtype=dtype)
    return SlotCache(keys=tuple(k for k, _ in layers), values=tuple(v for _, v in layers))


def _empty_layers(
    config: ModelConfig, num: int, length: int, *, dtype: str
) -> list[tuple[Held, Held]]:
    """For each layer keys [num, K, H, length] and values [num, K, length, H]."""
    heads, size = config.num_key_value_heads, config.head_dim
    return [
        (
            empty((num, heads, size, length), head_axis=-2, dtype=dtype),
            empty((num, heads, length, size), head_axis=-1, dtype=dtype),
        )
        for _ in range(config.num_hidden_layers)
    ]


def _cut(
    array: jax.Array, first: jax.Array, begin: jax.Array, num: int, size: int, axis: int
) -> Any:
    """Positions begin to begin + size - 1, along `axis`, of rows first to first + num - 1."""
    starts: list[Any] = [0] * array.ndim
    starts[0], starts[axis] = first, begin
    sizes = list(array.shape)
    sizes[0], sizes[axis] = num, size
    return jax.lax.dynamic_slice(array, starts, sizes)


def _put(array: jax.Array, part: jax.Array, first: jax.Array, begin: jax.Array, axis: int) -> Any:
    """`part` at positions begin, … along `axis` of rows first, …"""
    starts: list[Any] = [0] * array.ndim
    starts[0], starts[axis] = first, begin
    return jax.lax.dynamic_update_slice(array, part, starts)


# The axis of positions.
_OF_KEYS, _OF_VALUES = 3, 2


def attend_slots(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    layer: tuple[Held, Held],
    rows: SlotRows,
    *,
    sliding_window: int | None,
) -> tuple[Float[Array, "B T N H"], tuple[Held, Held]]:
    """Writes the new keys and values, then attends: (mixed values, the layer's arrays)."""
    keys, values = _write(layer, key, value, rows)
    batch, capacity = query.shape[0], keys.shape[_OF_KEYS]
    if batch <= _TOGETHER:
        return _attend(query, keys, values, rows, sliding_window), (keys, values)

    def some(number: jax.Array, mixed: jax.Array) -> jax.Array:
        # The last rows may share some with those before, and give the same again.
        begin = jnp.minimum(number * _TOGETHER, batch - _TOGETHER)
        part, places = (
            jax.lax.dynamic_slice_in_dim(each, begin, _TOGETHER) for each in (query, rows.positions)
        )
        visible = jnp.where(places < capacity, places + 1, 1).max()
        these = SlotRows(rows.first + begin, places, visible)
        result = _attend(part, keys, values, these, sliding_window)
        return jax.lax.dynamic_update_slice_in_dim(mixed, result, begin, 0)

    mixed = jax.lax.fori_loop(0, -(-batch // _TOGETHER), some, jnp.zeros_like(query))
    return mixed, (keys, values)


def _attend(
    query: jax.Array, keys: Held, values: Held, rows: SlotRows, sliding_window: int | None
) -> Float[Array, "B T N H"]:
    """The mixed values of rows whose keys and values are in."""
    batch, length, heads, size = query.shape
    kv_heads, capacity = keys.shape[1], keys.shape[_OF_KEYS]
    groups = heads // kv_heads
    dtype = query.dtype
    query = query.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, groups * length, size)
    places = jnp.tile(rows.positions, (1, groups))[:, None, :, None]  # of the query [B, 1, G*T, 1]
    multiply = few_rows_product if length <= FEW_TOKENS else many_rows_product
    offsets = jnp.arange(TILE, dtype=jnp.int32)

    def tile(index: jax.Array, carry: Any) -> Any:
        largest, total, mixed = carry
        begin = index * TILE
        seen, held = (
            jax.tree.map(
                lambda array, axis=axis: _cut(array, rows.first, begin, batch, TILE, axis), side
            )
            for side, axis in ((keys, _OF_KEYS), (values, _OF_VALUES))
        )
        scores = scaled(multiply(query, unscaled(seen, dtype)), seen, head_axis=-2) * size**-0.5
        mask = begin + offsets <= places
        if sliding_window is not None:
            mask &= begin + offsets > places - sliding_window
        scores = jnp.where(mask, scores, MASKED)
        larger = jnp.maximum(largest, scores.max(axis=-1))
        kept = jnp.exp(largest - larger)
        weights = jnp.exp(scores - larger[..., None])
        total = total * kept + weights.sum(axis=-1)
        weights = scaled(weights, held, head_axis=-1).astype(dtype)
        added = multiply(weights, unscaled(held, dtype))
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
    return mixed.reshape(batch, length, heads, size)


def _write(
    layer: tuple[Held, Held], key: jax.Array, value: jax.Array, rows: SlotRows
) -> tuple[Held, Held]:
    """One row is one slice; several rows are at places of their own."""
    if key.shape[0] == 1:
        begin = rows.positions[0, 0]

        def write(array: jax.Array, part: jax.Array, axis: int) -> jax.Array:
            part = jnp.moveaxis(part, 1, axis)
            return _put(array, part, rows.first, begin, axis)

    else:
        slots = (rows.first + jnp.arange(key.shape[0], dtype=jnp.int32))[:, None]

        def write(array: jax.Array, part: jax.Array, axis: int) -> jax.Array:
            places = array.at[(slots, *(slice(None),) * (axis - 1), rows.positions)]
            return places.set(part, mode="drop", unique_indices=True)

    keys, values = (
        jax.tree.map(
            lambda array, part, axis=axis: write(array, part, axis), side, as_held(new, side)
        )
        for side, new, axis in zip(layer, (key, value), (_OF_KEYS, _OF_VALUES), strict=True)
    )
    return keys, values


def copy_slot(cache: SlotCache, source: Int[Array, ""], target: Int[Array, ""]) -> SlotCache:
    """The cache with one slot's content in another's place, too."""

    def copy(array: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(array, source, 0)
        return jax.lax.dynamic_update_index_in_dim(array, one, target, 0)

    return _with_layers(cache, jax.tree.map(copy, _layers(cache)))


def clear_slot(cache: SlotCache, slot: Int[Array, ""]) -> SlotCache:
    """The cache with zeros in a slot."""

    def clear(array: jax.Array) -> jax.Array:
        zeros = jnp.zeros(array.shape[1:], array.dtype)
        return jax.lax.dynamic_update_index_in_dim(array, zeros, slot, 0)

    return _with_layers(cache, jax.tree.map(clear, _layers(cache)))


def read_slot(cache: SlotCache, slot: Int[Array, ""]) -> list[tuple[Held, Held]]:
    """(keys [K, H, S], values [K, S, H]) of each layer."""

    def read(array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, slot, 0, keepdims=False)

    return jax.tree.map(read, _layers(cache))


def write_slot(
    cache: SlotCache, slot: Int[Array, ""], content: list[tuple[Held, Held]]
) -> SlotCache:
    """Puts back what `read_slot` took out."""

    def write(array: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, new, slot, 0)

    return _with_layers(cache, jax.tree.map(write, _layers(cache), content))


def cut_content(content: list[tuple[Any, Any]], num_tokens: int) -> list[tuple[Any, Any]]:
    """The first positions of what `read_slot` took out, on the host."""

    def cut(axis: int, array: np.ndarray) -> np.ndarray:
        return array[(slice(None),) * (axis - 1) + (slice(num_tokens),)].copy()

    return _of_each(cut, content)


def fill_content(content: list[tuple[Any, Any]], capacity: int) -> list[tuple[Any, Any]]:
    """The same followed by zeros, as `write_slot` takes it."""

    def fill(axis: int, array: np.ndarray) -> np.ndarray:
        widths = [(0, 0)] * array.ndim
        widths[axis - 1] = (0, capacity - array.shape[axis - 1])
        return np.pad(array, widths)

    return _of_each(fill, content)


def _layers(cache: SlotCache) -> list[tuple[Held, Held]]:
    return list(zip(cache.keys, cache.values, strict=True))


def _with_layers(cache: SlotCache, layers: list[tuple[Held, Held]]) -> SlotCache:
    keys, values = zip(*layers, strict=True)
    return dataclasses.replace(cache, keys=keys, values=values)


# Blocks: the same content cut into pieces of a few positions, kept for other rows to begin with.


def init_blocks(
    config: ModelConfig, num_blocks: int, block_size: int, *, dtype: str
) -> list[tuple[Held, Held]]:
    """For each layer keys [blocks, K, H, block] and values [blocks, K, block, H]."""
    return _empty_layers(config, num_blocks, block_size, dtype=dtype)


def save_blocks(
    blocks: list[tuple[Held, Held]],
    cache: SlotCache,
    slot: Int[Array, ""],
    ids: Int[Array, " M"],
    begin: Int[Array, ""],
    end: Int[Array, ""],
) -> list[tuple[Held, Held]]:
    """Copies blocks number begin to end - 1 of a slot to the places ids[begin:end]."""

    def one(number: jax.Array, blocks: Any) -> Any:
        def save(axis: int, kept: jax.Array, of_slot: jax.Array) -> jax.Array:
            size = kept.shape[axis]
            part = _cut(of_slot, slot, number * size, 1, size, axis)
            return _put(kept, part, ids[number], jnp.int32(0), axis)

        return _of_each(save, blocks, _layers(cache))

    return jax.lax.fori_loop(begin, end, one, blocks)


def load_blocks(
    cache: SlotCache,
    blocks: list[tuple[Held, Held]],
    slot: Int[Array, ""],
    ids: Int[Array, " M"],
    end: Int[Array, ""],
) -> SlotCache:
    """Fills the beginning of a slot from the blocks ids[:end]."""

    def one(number: jax.Array, layers: Any) -> Any:
        def load(axis: int, of_slots: jax.Array, kept: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_index_in_dim(kept, ids[number], 0)
            return _put(of_slots, part, slot, number * kept.shape[axis], axis)

        return _of_each(load, layers, blocks)

    return _with_layers(cache, jax.lax.fori_loop(0, end, one, _layers(cache)))


def _of_each(change: Any, *layers: Any) -> list[tuple[Any, Any]]:
    """change(axis of positions, array, …) for all arrays of all layers."""
    result = []
    for each in zip(*layers, strict=True):
        keys, values = zip(*each, strict=True)
        result.append(
            (
                jax.tree.map(partial(change, _OF_KEYS), *keys),
                jax.tree.map(partial(change, _OF_VALUES), *values),
            )
        )
    return result
