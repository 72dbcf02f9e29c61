"""The only product of activations and weights, and the only look-up of embedding rows.

Every number format and every adapter is a branch here and nowhere in the model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from qwix import QArray

from llama_jax.config import Compute
from llama_jax.weights import qat
from llama_jax.weights.tensors import (
    DecodingTensor,
    IntegerTensor,
    Leaf,
    LoraTensor,
    PackedTensor,
    QatTensor,
    SavedTensor,
    StackedLora,
    is_quantized,
    to_array,
)

_FEW_ROWS = 48
# XLA's kernels take columns by the eight, and how they add may differ between an odd and an even
# number of eights: with AVX2 for each even one, with AVX-512 for 25 to 32 columns.
_EIGHT = 8
_TAKEN_WHOLE = 2**15  # numbers, rows times `in`


def dot(
    x: jax.Array, weight: Leaf, *, compute: Compute, keep_accumulator: bool = False
) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out], in x's dtype.

    Sums are kept in `compute.accumulation_dtype`, and returned in it with `keep_accumulator`
    (for logits, which are not rounded on their way to the loss or the sampler). The operands are
    made two-dimensional first: XLA runs that product, and its gradients, up to twice as fast on a
    CPU, and it is the same on a TPU.
    """
    product = _product(x.reshape(-1, x.shape[-1]), weight, compute)
    if not keep_accumulator:
        product = product.astype(x.dtype)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _product(x: jax.Array, weight: Leaf, compute: Compute) -> jax.Array:
    """x [T, in] -> [T, out] in the accumulation dtype."""
    if isinstance(weight, SavedTensor):
        return _product(x, weight.saved, compute)
    if isinstance(weight, LoraTensor):
        base = _product(x, weight.base, compute)
        # Scaled where it is narrow: forward and backward touch R numbers a token, not `out`.
        low = _plain(x, weight.lora_a.astype(x.dtype), compute)
        low = (low * weight.scale.astype(low.dtype)).astype(x.dtype)
        return base + _plain(low, weight.lora_b.astype(x.dtype), compute)
    if isinstance(weight, StackedLora):
        base = _product(x, weight.base, compute)
        low = _plain(x, weight.lora_a.astype(x.dtype), compute, contracted=0)
        owner = jnp.arange(low.shape[1], dtype=jnp.int32) // weight.rank % weight.count
        # The others' part is zero, and adds exactly nothing.
        low = jnp.where(weight.chosen[:, None] == owner, low, 0).astype(x.dtype)
        return base + _plain(low, weight.lora_b.astype(x.dtype), compute, contracted=0)
    if isinstance(weight, IntegerTensor):
        return _integer_product(x, weight).astype(compute.accumulation_dtype)
    if isinstance(weight, QatTensor):
        wide = x.astype(jnp.float32), weight.weight.astype(jnp.float32)
        rounded = qat.product(*wide, bits=weight.bits, backward=weight.backward)
        return rounded.astype(compute.accumulation_dtype)
    if is_quantized(weight):
        # Weight-only: the products are of activations and rescaled integers, as QLoRA has them.
        return _plain(x, to_array(weight, dtype=x.dtype), compute)
    if isinstance(weight, DecodingTensor):
        return _few_rows(x, weight, compute)
    return _plain(x, weight.astype(x.dtype), compute)


@jax.custom_vjp
def _integer_product(x: jax.Array, weight: IntegerTensor) -> jax.Array:
    """x [T, in], rounded to int8, times integers, summed as int32 and scaled: float32 [T, out]."""
    wide = x.astype(jnp.float32)
    if weight.base.scale.shape[-1] > 1:
        return _tiled_product(wide, weight)
    scale = weight.activation_scale
    if scale is None:
        scale = _activation_scales(wide)
    total = _integer_sums(_rounded(wide, scale), weight.codes())
    # In the order of AQT, whose training this must equal bit for bit.
    return total * scale * weight.base.scale.astype(jnp.float32)[:, 0]


def _tiled_product(x: jax.Array, weight: IntegerTensor) -> jax.Array:
    """The same with scales for each tile of a row, whose sums are added one tile at a time."""
    tile, scales = weight.tile, weight.base.scale.astype(jnp.float32)
    tiles = scales.shape[-1]
    padding = ((0, 0), (0, tiles * tile - x.shape[-1]))
    parts = jnp.pad(x, padding).reshape(len(x), tiles, tile)
    own = _activation_scales(parts)
    codes = _rounded(parts, own).reshape(len(x), -1)
    matrix = jnp.pad(weight.codes(), padding)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        left, right = (
            jax.lax.dynamic_slice_in_dim(each, i * tile, tile, axis=1) for each in (codes, matrix)
        )
        return total + _integer_sums(left, right) * own[:, i] * scales[:, i]

    return jax.lax.fori_loop(0, tiles, add, jnp.zeros((len(x), len(matrix)), jnp.float32))


def _activation_scales(x: jax.Array) -> jax.Array:
    """[..., 1]: of each row its own."""
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # A row of zeros, or of numbers too small for a scale.
    return jnp.where(peak < jnp.finfo(jnp.float32).tiny * 127, 1.0, peak / 127)


def _rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(x * (1 / scale)), -127, 127).astype(jnp.int8)


def _integer_sums(left: jax.Array, right: jax.Array) -> jax.Array:
    """int8 [T, in] times int8 [out, in], exact, as float32 [T, out]."""
    total = jax.lax.dot_general(
        left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    return total.astype(jnp.float32)


def _integer_forward(x: jax.Array, weight: IntegerTensor) -> Any:
    return _integer_product(x, weight), (x, weight)


def _integer_backward(kept: Any, gradient: jax.Array) -> Any:
    """Straight through the rounding, whose own gradient is zero almost everywhere: adapters of
    layers below learn from it. The integers themselves have no gradient."""
    x, weight = kept
    matrix = to_array(weight, dtype=x.dtype)
    return (gradient.astype(x.dtype) @ matrix).astype(x.dtype), None


_integer_product.defvjp(_integer_forward, _integer_backward)


def _plain(x: jax.Array, weight: jax.Array, compute: Compute, *, contracted: int = 1) -> jax.Array:
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (contracted,)), ((), ())),
        preferred_element_type=jnp.dtype(compute.accumulation_dtype),
    )


def _few_rows(x: jax.Array, weight: DecodingTensor, compute: Compute) -> jax.Array:
    """x [T, in] times weight [out, in] -> [T, out], the weight first: with 2 to 48 rows XLA's
    CPU backend, which copies its first operand into tiles, takes a fifth to a third less time."""
    rows, array = x.shape[0], weight.array.astype(x.dtype)
    if not 1 < rows <= _FEW_ROWS:
        return _plain(x, array, compute)
    if not weight.sums_alike:
        return _weight_first(x, array, compute)
    parts = [_weight_first(part, array, compute) for part in _alike(x)]
    return jnp.concatenate(parts)[:rows]


def _alike(x: jax.Array) -> list[jax.Array]:
    """x [T, in], with rows of zeros after it, in parts of one or three eights: products of such sum
    in one order, those of an even number in another, those of a single row in a third. Newer
    versions of JAX want whole eights, and few enough for the product not to be cut along `in`."""
    rows, width = x.shape
    if jax.__version_info__ < (0, 11):
        most, padding = 3, 0
        last = rows % (most * _EIGHT)
        if last == 1:
            padding = 1
        elif _EIGHT < last <= 2 * _EIGHT:
            # A part of three eights takes less time than two of one.
            padding = most * _EIGHT - last
    else:
        most, padding = max(1, _TAKEN_WHOLE // (width * _EIGHT)), -rows % _EIGHT
    padded = jnp.pad(x, ((0, padding), (0, 0)))
    parts = []
    while padded.shape[0]:
        left = -(-padded.shape[0] // _EIGHT)
        count = min(most, left)
        count = _EIGHT * (count - 1 + count % 2)
        parts.append(padded[:count])
        padded = padded[count:]
    return parts


def _weight_first(x: jax.Array, array: jax.Array, compute: Compute) -> jax.Array:
    # The barrier keeps XLA from turning the product back.
    return jax.lax.optimization_barrier(_plain(array, x, compute)).T


def embed(weight: Leaf, ids: jax.Array, *, compute: Compute) -> jax.Array:
    """Rows of weight [V, D] at ids [...] -> [..., D] in the compute dtype."""
    dtype: Any = jnp.dtype(compute.dtype)
    if isinstance(weight, SavedTensor):
        return embed(weight.saved, ids, compute=compute)
    if isinstance(weight, LoraTensor):
        rows = embed(weight.base, ids, compute=compute).astype(jnp.float32)
        low = jnp.take(weight.lora_b, ids, axis=0).astype(jnp.float32)
        update = low @ weight.lora_a.astype(jnp.float32)
        return (rows + update * weight.scale.astype(jnp.float32)).astype(dtype)
    if isinstance(weight, QatTensor):
        return embed(weight.dequantize(), ids, compute=compute)
    if isinstance(weight, IntegerTensor):
        return embed(weight.base, ids, compute=compute)
    if isinstance(weight, DecodingTensor):
        return embed(weight.array, ids, compute=compute)
    if isinstance(weight, PackedTensor):
        rows_of = dataclasses.replace(
            weight,
            packed=jnp.take(weight.packed, ids, axis=0),
            scale=jax.tree.map(lambda part: jnp.take(part, ids, axis=0), weight.scale),
        )
        return to_array(rows_of, dtype=dtype)
    if isinstance(weight, QArray):
        values = jnp.take(weight.qvalue, ids, axis=0)
        scale = jnp.take(weight.scale, ids // (weight.shape[0] // weight.scale.shape[0]), axis=0)
        row = QArray(values, scale.astype(jnp.float32), None, weight.qtype)
        return to_array(row, dtype=dtype)
    return jnp.take(weight, ids, axis=0).astype(dtype)
