"""What adapters add to a leaf: low-rank updates, and weights that are trained whole."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.weights.leaf import Array, Leaf, OfBase


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraTensor(OfBase):
    """A matrix W with a low-rank update: W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685).

    base: [..., out, in], any other leaf; lora_a: [..., R, in]; lora_b: [..., out, R];
    scale: [...], alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv:2312.03732), for each
    layer. Layers stack on the leading dimensions and may have different ranks: R is the largest,
    the rest is zero in both factors and so gets zero gradients and stays zero. `ranks` holds the
    true rank of each matrix of the stack, row-major (0: no adapter here); it describes the whole
    stack and travels unchanged with its slices.
    """

    base: Leaf
    lora_a: Array
    lora_b: Array
    scale: Array
    ranks: tuple[int, ...] = field(metadata={"static": True})
    use_rslora: bool = field(default=False, metadata={"static": True})

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
@dataclass(frozen=True, kw_only=True)
class DroppedLora(LoraTensor):
    """A `LoraTensor` within a training step: what goes into its factors is dropped out, as PEFT
    does it (Srivastava et al. 2014): each number is zero with probability `rate`, else divided by
    1 - rate. The base gets all of it. key: [..., 2] uint32, of each matrix of the stack; axis: of
    `jax.pmap`, where a device has a part of the rows and draws what it would have drawn for them
    among all."""

    key: Array
    rate: float = field(metadata={"static": True})
    axis: str | None = field(metadata={"static": True})

    def dropped(self, x: jax.Array) -> jax.Array:
        """x [T, in], for one matrix."""
        key = jax.random.wrap_key_data(self.key, impl="threefry2x32")
        rows, width = x.shape
        parts = 1 if self.axis is None else jax.lax.axis_size(self.axis)
        kept = jax.random.bernoulli(key, 1 - self.rate, (parts * rows, width))
        if self.axis is not None:
            own = jax.lax.axis_index(self.axis) * rows
            kept = jax.lax.dynamic_slice_in_dim(kept, own, rows)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedLora(OfBase):
    """A matrix with several low-rank updates, of which each row of activations takes one.

    base: [out, in], any leaf without an adapter; lora_a: [in, A * R] and lora_b: [A * R, out],
    scales included, for A adapters of R = `rank`; chosen: [T], the adapter of each row, negative
    for none.
    """

    base: Leaf
    lora_a: Array
    lora_b: Array
    chosen: Array
    rank: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SavedTensor:
    """A weight trained whole beside its frozen original, as PEFT's `modules_to_save` has it.

    The model computes with `saved`; `base` is what it was before, kept so that the adapter can be
    taken off again.
    """

    base: Leaf
    saved: Array

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
