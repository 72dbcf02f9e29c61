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
from llama_jax.weights.adapted import DroppedLora, LoraTensor, SavedTensor, StackedLora
from llama_jax.weights.decoding import decoding_product, plain_product
from llama_jax.weights.float8 import as_float8
from llama_jax.weights.integers import integer_product
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import (
    Float8Tensor,
    IntegerTensor,
    PackedTensor,
    RoundedInputs,
    is_quantized,
)
from llama_jax.weights.tensors import DecodingTensor, QatTensor, to_array


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
        x = weight.dropped(x) if isinstance(weight, DroppedLora) else x
        # Scaled where it is narrow: forward and backward touch R numbers a token, not `out`.
        low = plain_product(x, weight.lora_a.astype(x.dtype), compute)
        low = (low * weight.scale.astype(low.dtype)).astype(x.dtype)
        return base + plain_product(low, weight.lora_b.astype(x.dtype), compute)
    if isinstance(weight, StackedLora):
        base = _product(x, weight.base, compute)
        low = plain_product(x, weight.lora_a.astype(x.dtype), compute, contracted=0)
        owner = jnp.arange(low.shape[1], dtype=jnp.int32) // weight.rank
        # The others' part is zero, and adds exactly nothing.
        low = jnp.where(weight.chosen[:, None] == owner, low, 0).astype(x.dtype)
        return base + plain_product(low, weight.lora_b.astype(x.dtype), compute, contracted=0)
    if isinstance(weight, IntegerTensor):
        return integer_product(x, weight).astype(compute.accumulation_dtype)
    if isinstance(weight, Float8Tensor):
        x = as_float8(x, weight.activation_scale).astype(x.dtype)
        return _product(x, weight.base, compute)
    if isinstance(weight, QatTensor):
        wide = x.astype(jnp.float32), weight.weight.astype(jnp.float32)
        rounded = qat.product(*wide, bits=weight.bits, backward=weight.backward)
        return rounded.astype(compute.accumulation_dtype)
    if is_quantized(weight):
        # Weight-only: the products are of activations and rescaled integers, as QLoRA has them.
        return plain_product(x, to_array(weight, dtype=x.dtype), compute)
    if isinstance(weight, DecodingTensor):
        return decoding_product(x, weight, compute)
    return plain_product(x, weight.astype(x.dtype), compute)


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
    if isinstance(weight, RoundedInputs):
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
