"""The kinds of weight leaf: a plain array, a quantized tensor, an adapted tensor.

The quantized tensor is Qwix's `QArray` (int8, int4, nf4, fp8 with per-channel or tiled scales); it
has the shape of the matrix it stands for. The adapted tensor is defined here. What multiplies
them is in `dot.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from qwix import QArray

Leaf = Any  # jax.Array | QArray | LoraTensor | SavedTensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraTensor:
    """A matrix W with a low-rank update: W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685).

    base: [..., out, in], array or quantized; lora_a: [..., R, in]; lora_b: [..., out, R];
    scale: [...], alpha / r or alpha / sqrt(r) for each layer. Layers stack on the leading
    dimensions and may have different ranks: R is the largest, the rest is zero in both factors and
    so gets zero gradients and stays zero. `ranks` holds the true rank of each layer (0: this layer
    has no adapter); it describes the whole stack and travels unchanged with its slices.
    """

    base: Leaf
    lora_a: jax.Array
    lora_b: jax.Array
    scale: jax.Array
    ranks: tuple[int, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def delta(self) -> jax.Array:
        """scale * B @ A in float32, [..., out, in]."""
        product = jnp.einsum(
            "...or,...ri->...oi",
            self.lora_b.astype(jnp.float32),
            self.lora_a.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return product * self.scale.astype(jnp.float32)[..., None, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SavedTensor:
    """A weight trained whole beside its frozen original, as PEFT's `modules_to_save` has it.

    The model computes with `saved`; `base` is what it was before, kept so that the adapter can be
    taken off again.
    """

    base: Leaf
    saved: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.saved.shape

    @property
    def ndim(self) -> int:
        return len(self.saved.shape)

    @property
    def dtype(self) -> Any:
        return self.saved.dtype

    def astype(self, dtype: Any) -> jax.Array:
        """What the model computes with, for weights that are not multiplied: norms and biases."""
        return self.saved.astype(dtype)


def is_adapted(leaf: Leaf) -> bool:
    """Whether the leaf holds something an adapter added."""
    return isinstance(leaf, LoraTensor | SavedTensor)


def is_quantized(leaf: Leaf) -> bool:
    return isinstance(leaf, QArray)


def to_array(leaf: Leaf, *, dtype: Any = jnp.float32) -> jax.Array:
    """The full matrix a leaf stands for, computed in float32 and rounded once to `dtype`."""
    return _to_float32(leaf).astype(dtype)


def _to_float32(leaf: Leaf) -> jax.Array:
    if isinstance(leaf, LoraTensor):
        return _to_float32(leaf.base) + leaf.delta()
    if isinstance(leaf, SavedTensor):
        return _to_float32(leaf.saved)
    if isinstance(leaf, QArray):
        return qwix.dequantize(leaf.astype(jnp.float32))
    return jnp.asarray(leaf).astype(jnp.float32)
