"""Causal grouped-query attention: who sees whom, and the reference computation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.kernels.few_rows import MASKED, few_rows_product, many_rows_product
from llama_jax.kernels.rounded import Held, Rounded, scaled, unscaled

# Four blocks of queries leave out three eighths of the work; more gain little.
_BLOCKS = 4
_SMALLEST_BLOCK = 32


def causal_mask(
    query: Int[Array, "B T"],
    key: Int[Array, "B S"],
    *,
    sliding_window: int | None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """Which keys each query sees, from the places of both in their row.

    A window of W lets a query see W keys, itself included. Segments see only themselves; segment
    0 is padding, which sees padding, so that every query sees at least itself.
    """
    q, k = query[:, :, None], key[:, None, :]
    mask = k <= q
    if sliding_window is not None:
        mask &= k > q - sliding_window
    if query_segments is not None:
        assert key_segments is not None
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K H S"] | Rounded,
    value: Float[Array, "B K S H"] | Rounded,
    mask: Bool[Array, "#B T S"],
    *,
    is_divided: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v with the softmax in float32, N query heads over K key heads.

    When there are as many keys as queries, query t is at the place of key t, and what lies behind
    a block of queries is masked for all of them: it is not computed. Not so when the queries are
    divided over devices (`mesh.sequence`).
    """
    length, slots = mask.shape[1:]
    if length != slots or is_divided or not _in_blocks(length):
        return _attend(query, key, value, mask)
    size = length // _BLOCKS
    blocks = []
    for end in range(size, length + 1, size):
        rows = slice(end - size, end)
        blocks.append(
            _attend(query[:, rows], key[..., :end], value[:, :, :end], mask[:, rows, :end])
        )
    return jnp.concatenate(blocks, axis=1)


def _in_blocks(length: int) -> bool:
    return length % _BLOCKS == 0 and length // _BLOCKS >= _SMALLEST_BLOCK


def computed_share(length: int, sliding_window: int | None, parts: int = 1) -> float:
    """The part of all pairs of query and key that `attend` computes; a window saves nothing."""
    del sliding_window
    return (_BLOCKS + 1) / (2 * _BLOCKS) if _in_blocks(length) and parts == 1 else 1.0


def _attend(query: jax.Array, key: Held, value: Held, mask: jax.Array) -> jax.Array:
    """`attend` over all keys. The G queries of a group are folded into the rows of one product, so
    that keys are read once."""
    batch, length, heads, size = query.shape
    dtype = query.dtype
    kv_heads, slots = key.shape[1], key.shape[3]
    groups = heads // kv_heads
    query = query.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, groups * length, size)
    multiply = many_rows_product if length > 1 else few_rows_product
    scores = scaled(multiply(query, unscaled(key, dtype)), key, head_axis=-2) * size**-0.5
    scores = scores.reshape(batch, kv_heads, groups, length, slots)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).reshape(batch, kv_heads, groups * length, slots)
    weights = scaled(weights, value, head_axis=-1).astype(dtype)
    mixed = multiply(weights, unscaled(value, dtype))
    mixed = mixed.astype(dtype).reshape(batch, kv_heads, groups, length, size)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)
