"""Products of integers: activations rounded to int8, times int8 or int4 weights, scaled after."""

from typing import Any

import jax
import jax.numpy as jnp
from qwix import QArray

from llama_jax.weights.quantized import IntegerTensor, PackedTensor
from llama_jax.weights.tensors import to_array


@jax.custom_vjp
def integer_product(x: jax.Array, weight: IntegerTensor) -> jax.Array:
    """x [T, in], rounded to int8, times integers, summed as int32 and scaled: float32 [T, out]."""
    wide = x.astype(jnp.float32)
    if weight.is_tiled:
        return _tiled_product(wide, weight)
    values, scale = rounded(wide, weight.activation_scale)
    return rescaled(integer_sums(values, weight.codes()), scale, weight.base)


def rounded(x: jax.Array, scale: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """x [..., n] -> (int8, scale), each row with the scale [..., 1] of its own where none is
    given."""
    if scale is None:
        peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        # A row of zeros, or of numbers too small for a scale.
        scale = jnp.where(peak < jnp.finfo(jnp.float32).tiny * 127, 1.0, peak / 127)
    return jnp.clip(jnp.round(x * (1 / scale)), -127, 127).astype(jnp.int8), scale


def integer_sums(left: jax.Array, right: jax.Array) -> jax.Array:
    """int8 [T, in] times int8 [out, in], exact: int32 [T, out]."""
    rows = len(left)
    if rows == 1:
        # XLA's CPU backend has its fast product of integers for two rows and more only.
        left = jnp.pad(left, ((0, 1), (0, 0)))
    return jax.lax.dot_general(
        left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )[:rows]


def rescaled(sums: jax.Array, scale: jax.Array, base: QArray | PackedTensor) -> jax.Array:
    """Sums [T, out] times the scales of activations and of weights, in the order of AQT, whose
    training this must equal bit for bit."""
    return sums.astype(jnp.float32) * scale * base.scale.astype(jnp.float32)[:, 0]


def in_tiles(x: jax.Array, weight: IntegerTensor) -> jax.Array:
    """x [T, in] -> [T, tiles, tile], the last filled up with zeros."""
    tiles = weight.base.scale.shape[-1]
    padding = ((0, 0), (0, tiles * weight.tile - x.shape[-1]))
    return jnp.pad(x, padding).reshape(len(x), tiles, weight.tile)


def _tiled_product(x: jax.Array, weight: IntegerTensor) -> jax.Array:
    """The same with scales for each tile of a row, whose sums are added one tile at a time."""
    tile, scales = weight.tile, weight.base.scale.astype(jnp.float32)
    values, own = rounded(in_tiles(x, weight))
    values = values.reshape(len(x), -1)
    matrix = weight.codes()
    matrix = jnp.pad(matrix, ((0, 0), (0, values.shape[-1] - matrix.shape[-1])))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        left, right = (
            jax.lax.dynamic_slice_in_dim(each, i * tile, tile, axis=1) for each in (values, matrix)
        )
        return total + integer_sums(left, right).astype(jnp.float32) * own[:, i] * scales[:, i]

    start = jnp.zeros((len(x), len(matrix)), jnp.float32)
    return jax.lax.fori_loop(0, scales.shape[-1], add, start)


def _forward(x: jax.Array, weight: IntegerTensor) -> Any:
    return integer_product(x, weight), (x, weight)


def _backward(kept: Any, gradient: jax.Array) -> Any:
    """Straight through the rounding, whose own gradient is zero almost everywhere: adapters of
    layers below learn from it. The integers themselves have no gradient."""
    x, weight = kept
    matrix = to_array(weight, dtype=x.dtype)
    return (gradient.astype(x.dtype) @ matrix).astype(x.dtype), None


integer_product.defvjp(_forward, _backward)
