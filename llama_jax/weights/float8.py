"""Inputs as the float8 numbers (e4m3) that stand for them."""

import jax
import jax.numpy as jnp

LARGEST = float(jnp.finfo(jnp.float8_e4m3fn).max)  # 448

_MANTISSA_BITS = 3
_LEAST_NORMAL = 2.0**-6
_LEAST = 2.0**-9  # below the least normal number all are multiples of it


@jax.custom_vjp
def as_float8(x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """x [..., n] -> float32 [..., n]: each number divided by its scale, rounded to float8 and
    multiplied by the scale again, which each row has of its own where none is given: the largest
    magnitude of a row becomes the largest of float8. Gradients pass straight through.

    Source: compressed-tensors' `fake_quantize`, with its scales of FP8-dynamic (a token) and FP8
    (one for all).
    """
    wide = x.astype(jnp.float32)
    if scale is None:
        peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        # A row of zeros, or of numbers too small for a scale.
        scale = jnp.where(peak < jnp.finfo(jnp.float32).tiny * LARGEST, 1.0, peak / LARGEST)
    return to_nearest(jnp.clip(wide / scale, -LARGEST, LARGEST)) * scale


def to_nearest(x: jax.Array) -> jax.Array:
    """The float8 nearest to float32 numbers of at most `LARGEST`, half to even, as float32. By
    arithmetic: XLA may take a conversion to a narrow type and back for nothing."""
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_MANTISSA_BITS)
    return jnp.where(jnp.abs(x) < _LEAST_NORMAL, jnp.round(x / _LEAST) * _LEAST, normal)


def _forward(x: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    return as_float8(x, scale), x[..., :0]  # what its dtype was


def _backward(kept: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return gradient.astype(kept.dtype), None


as_float8.defvjp(_forward, _backward)
