"""Rotary position embedding and its scalings.

Frequencies are computed in float64 on the host from the config alone and angles in float32,
whatever the compute type: at position 4095 a bfloat16 angle is off by more than one radian.
Formulas follow transformers' `modeling_rope_utils`, which is the reference for published models. It
computes frequencies in float32, and some of its bits differ from these, which are the nearest to
the formulas: at theta 500000 and position 8191 its cosine of pair 2 is off by 2.1e-4.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """[H/2] float64 radians per position, after scaling.

    `dynamic` returns the unscaled ones: it scales by the length seen, in `angles`.
    """
    base = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return base
    if scaling.rope_type == "linear":
        return base / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(base, scaling)
    return _yarn(base, scaling, config)


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, the band between blended."""
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert original is not None and low is not None and high is not None
    turns = original * base / (2 * math.pi)  # full turns over the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * base + (1 - keep) * base / scaling.factor


def _yarn(base: np.ndarray, scaling: RopeScaling, config: ModelConfig) -> np.ndarray:
    """YaRN's NTK-by-parts (Peng et al. 2023, arXiv:2309.00071)."""
    original = scaling.original_max_position_embeddings or config.max_position_embeddings

    def dimension_of(num_turns: float) -> float:
        """The (fractional) pair index that makes `num_turns` over the original context."""
        return (config.head_dim * math.log(original / (num_turns * 2 * math.pi))) / (
            2 * math.log(config.rope_theta)
        )

    low = dimension_of(32.0 if scaling.beta_fast is None else scaling.beta_fast)
    high = dimension_of(1.0 if scaling.beta_slow is None else scaling.beta_slow)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    # As transformers does. A negative width is kept: the ramp then falls.
    ramp = (np.arange(len(base)) - low) / (0.001 if low == high else high - low)
    stretch = np.clip(ramp, 0.0, 1.0)
    return stretch * base / scaling.factor + (1 - stretch) * base


def attention_factor(config: ModelConfig) -> float:
    """What cosines and sines are multiplied by: YaRN's attention temperature, else 1."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def angles(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """(cos, sin) in float32, already multiplied by the attention factor."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        frequencies = _dynamic(config, scaling, positions)
    else:
        frequencies = jnp.asarray(inverse_frequencies(config), jnp.float32)
    radians = positions[..., None].astype(jnp.float32) * frequencies
    factor = attention_factor(config)
    return jnp.cos(radians) * factor, jnp.sin(radians) * factor


def _dynamic(
    config: ModelConfig, scaling: RopeScaling, positions: Int[Array, "B T"]
) -> Float[Array, "B 1 half"]:
    """NTK base that grows with the length of each row once it passes the trained context.

    transformers takes the longest row of the batch; here a row's result must not depend on its
    neighbours, so each takes its own. They agree for one row.
    """
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings
    seen = jnp.maximum(positions.max(axis=-1) + 1, trained).astype(jnp.float32)[:, None, None]
    dim = config.head_dim
    growth = scaling.factor * seen / trained - (scaling.factor - 1)
    base = config.rope_theta * growth ** (dim / (dim - 2))
    exponents = -jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    # Until then they are those of an unscaled model, bit for bit.
    plain = jnp.asarray(inverse_frequencies(config), jnp.float32)
    return jnp.where(seen > trained, base**exponents, plain)


def rotate(
    x: Float[Array, "B T heads H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
) -> Float[Array, "B T heads H"]:
    """Rotates the pairs (i, i + H/2), HF's layout, in float32 and rounds once to x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
