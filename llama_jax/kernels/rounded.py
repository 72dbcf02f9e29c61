"""Keys and values as a cache holds them: arrays of a float dtype, or int8 numbers with scales.

Both have the same axes, so a cache that moves tokens about maps over whatever arrays there are.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from llama_jax.config import ModelConfig

_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded:
    """codes: int8; scale: the same axes, the head's size being 1: one for each token and head.
    (Those of pages lie otherwise: `paged.empty_pages`.)

    A number is code * scale. The scale is the largest magnitude of the token's head over 127, so
    no number is further than half a scale, a 254th of that magnitude, from what was stored.
    """

    codes: Int8[Array, "*axes"]
    scale: Float[Array, "*scale_axes"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def __getitem__(self, index: Any) -> "Rounded":
        return Rounded(self.codes[index], self.scale[index])


Held = jax.Array | Rounded


def empty(shape: tuple[int, ...], *, head_axis: int, dtype: str) -> Held:
    """Zeros. dtype: a float's name, or int8."""
    if dtype != "int8":
        return jnp.zeros(shape, jnp.dtype(dtype))
    scales = list(shape)
    scales[head_axis] = 1
    return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros(scales, jnp.float32))


def as_held(new: Float[Array, "*axes H"], held: Held) -> Held:
    """`new` in the form that `held` has."""
    return rounded(new) if isinstance(held, Rounded) else new.astype(held.dtype)


def rounded(new: Float[Array, "*axes H"]) -> Rounded:
    wide = new.astype(jnp.float32)
    peak = jnp.abs(wide).max(axis=-1, keepdims=True)
    # Zeros, or numbers too small for a scale. What is not finite makes its scale so.
    scale = jnp.where(peak < jnp.finfo(jnp.float32).tiny * _LARGEST, 1.0, peak / _LARGEST)
    codes = jnp.clip(jnp.round(wide / scale), -_LARGEST, _LARGEST)
    return Rounded(codes.astype(jnp.int8), scale)


def unscaled(held: Held, dtype: Any) -> jax.Array:
    """The operand of a product, whose other side or result takes `scale`."""
    return (held.codes if isinstance(held, Rounded) else held).astype(dtype)


def scaled(numbers: jax.Array, held: Held, *, head_axis: int) -> jax.Array:
    """numbers [B, K, rows, S] times the scales of the S tokens of `held`, if it has any."""
    if not isinstance(held, Rounded):
        return numbers
    scale = jnp.squeeze(held.scale, head_axis)
    return numbers * scale[:, :, None]


def token_bytes(config: ModelConfig, dtype: str) -> int:
    """Of the keys and values of one token in all layers."""
    one = jax.eval_shape(lambda: empty((1, config.head_dim), head_axis=-1, dtype=dtype))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size
