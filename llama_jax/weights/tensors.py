"""Arrays that products treat in a way of their own, in training or in decoding, and the array that
any leaf stands for."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from qwix import QArray

from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.leaf import Array, Leaf
from llama_jax.weights.qat import Backward, codes
from llama_jax.weights.quantized import PackedTensor, RoundedInputs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QatTensor:
    """A matrix in training, [..., out, in], that is rounded to int8 or int4 in every product, and
    activations to int8; `backward` says how gradients pass (see `weights/qat.py`)."""

    weight: Array
    bits: int = field(metadata={"static": True})
    backward: Backward = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return len(self.weight.shape)

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def dequantize(self) -> jax.Array:
        """The matrix that products are made with, in float32."""
        flat = self.weight.astype(jnp.float32).reshape(-1, self.shape[-1])
        values, scale = codes(flat, bits=self.bits)
        return (values.astype(jnp.float32) * scale).reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodingTensor:
    """A matrix [out, in], an array or a quantized leaf, that meets few rows at a time on a CPU.

    alike_rows: where it is not 0, a row's result has the same bits in products of two rows as in
    those of so many, and of any number between.
    """

    array: Array
    alike_rows: int = field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        return len(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TappedTensor:
    """A float32 matrix whose gradient is kept in bfloat16: as that of `tap`, which has its shape
    and whose values nobody reads. It lives inside the gradient of a step, and nowhere else."""

    array: Array
    tap: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def astype(self, dtype: Any) -> jax.Array:
        return _tapped(narrowed(self.array, dtype), self.tap)


@jax.custom_vjp
def _tapped(array: jax.Array, tap: jax.Array) -> jax.Array:
    del tap
    return array


def _tapped_forward(array: jax.Array, tap: jax.Array) -> tuple[jax.Array, jax.Array]:
    return array, tap


def _tapped_backward(tap: jax.Array, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, gradient.astype(tap.dtype)


_tapped.defvjp(_tapped_forward, _tapped_backward)


def to_array(leaf: Leaf, *, dtype: Any = jnp.float32) -> jax.Array:
    """The full matrix a leaf stands for, computed in float32 and rounded once to `dtype`."""
    if isinstance(leaf, jax.Array | TappedTensor):
        return narrowed(leaf, dtype)
    return _to_float32(leaf).astype(dtype)


def narrowed(array: jax.Array | TappedTensor, dtype: Any) -> jax.Array:
    """`array.astype(dtype)`, at the place where it is written.

    XLA moves a mere conversion of what a loop over layers reads out of the loop, and then holds
    the weights of all layers once more, in bfloat16, for the whole step: a float32 model of 8e9
    parameters on 16 chips takes 1.3 GB more on each. It leaves a rounding where it is.
    """
    if isinstance(array, TappedTensor):
        return array.astype(dtype)
    if array.dtype == jnp.float32 and jnp.dtype(dtype) == jnp.bfloat16:
        return _to_bfloat16(array)
    return array.astype(dtype)


@jax.custom_jvp
def _to_bfloat16(array: jax.Array) -> jax.Array:
    # As many bits of exponent as float32 has, so that nothing is flushed to zero on the way.
    kept = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(array, kept.nexp, kept.nmant).astype(jnp.bfloat16)


@_to_bfloat16.defjvp
def _tangent_of_bfloat16(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _to_float32(leaf: Leaf) -> jax.Array:
    if isinstance(leaf, LoraTensor):
        return _to_float32(leaf.base) + leaf.delta()
    if isinstance(leaf, SavedTensor):
        return _to_float32(leaf.saved)
    if isinstance(leaf, RoundedInputs):
        return _to_float32(leaf.base)
    if isinstance(leaf, PackedTensor | QatTensor):
        return leaf.dequantize()
    if isinstance(leaf, DecodingTensor):
        return _to_float32(leaf.array)
    if isinstance(leaf, QArray):
        return qwix.dequantize(leaf.astype(jnp.float32))
    return jnp.asarray(leaf).astype(jnp.float32)
