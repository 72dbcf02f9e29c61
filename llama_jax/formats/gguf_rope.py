"""Rotary scaling in GGUF files: metadata for linear and YaRN, a tensor of divisors for Llama 3.

llama.cpp divides each frequency by its entry of `rope_freqs.weight`. Llama 3's converter writes
there what its four parameters amount to, so reading has to find parameters that give the same
divisors.
"""

import math
from collections.abc import Iterator

import numpy as np

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.formats.gguf_fields import Entry, Fields, float32_entry, text_entry, uint32_entry
from llama_jax.formats.gguf_header import shortest_float
from llama_jax.model.rope import inverse_frequencies

FACTORS_TENSOR = "rope_freqs.weight"

# Every published Llama 3 has these two. Multiplying both and the original length by one number
# changes no frequency, so the divisors alone cannot tell them; the low one is fixed by convention.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0

# Parameters of YaRN that llama.cpp multiplies in and that files in practice leave at their neutral
# value (-1 means "decide by the type").
_NEUTRAL = {
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.alpha": (0, 1),
}


def read_scaling(
    fields: Fields, *, theta: float, head_dim: int, factors: np.ndarray | None
) -> RopeScaling | None:
    """The scaling that `llama.rope.scaling.*` and the divisors [H/2] describe together."""
    for name, allowed in _NEUTRAL.items():
        fields.require(name, allowed)
    fields.skip("rope.scaling.finetuned")  # says how the model was made, not what it computes
    kind = fields.text("rope.scaling.type", None)
    # The older name of the factor of linear scaling; 0 means none, as for the newer.
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0)) or 1.0
    original = fields.integer("rope.scaling.original_context_length", 0) or None
    fast = fields.number("rope.scaling.yarn_beta_fast", 0.0) or None
    slow = fields.number("rope.scaling.yarn_beta_slow", 0.0) or None
    if kind is None:
        kind = "none" if factor == 1 else "linear"  # as llama.cpp does
    if kind not in ("none", "linear", "yarn"):
        fields.problem("rope.scaling.type", f"is {kind!r}; none, linear and yarn are supported")
        return None
    if kind == "yarn":
        scaling: RopeScaling | None = RopeScaling(
            rope_type="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=fast,
            beta_slow=slow,
        )
    else:
        linear = kind == "linear" and factor != 1
        scaling = RopeScaling(rope_type="linear", factor=factor) if linear else None
    if factors is None or np.all(factors == 1):
        return scaling
    if scaling is not None:
        fields.problem(
            "rope.scaling.type", f"is {kind!r}, but {FACTORS_TENSOR} holds divisors as well"
        )
        return scaling
    return _llama3_scaling(factors, theta=theta, head_dim=head_dim, original=original)


def _llama3_scaling(
    factors: np.ndarray, *, theta: float, head_dim: int, original: int | None
) -> RopeScaling:
    """Llama 3's parameters from the divisors, verified by computing the divisors from them."""
    if factors.shape == (head_dim // 2,) and np.all(np.isfinite(factors)) and np.all(factors >= 1):
        factor = shortest_float(factors.max())
        for length, high in _candidates(factors.astype(np.float64), theta, head_dim, original):
            scaling = RopeScaling(
                rope_type="llama3",
                factor=factor,
                original_max_position_embeddings=length,
                low_freq_factor=_LOW_FREQ_FACTOR,
                high_freq_factor=high,
            )
            expected = _factors(theta, head_dim, scaling)
            if np.allclose(expected, factors, rtol=1e-5, atol=0):
                return scaling
    raise ValueError(
        f"{FACTORS_TENSOR}: the {factors.size} divisors, from {factors.min():.6g} to "
        f"{factors.max():.6g}, are not those of Llama 3's rotary scaling for any original length "
        f"with low_freq_factor 1; no other use of this tensor is supported"
    )


def _candidates(
    factors: np.ndarray, theta: float, head_dim: int, original: int | None
) -> Iterator[tuple[int, float]]:
    """Pairs (original length, high_freq_factor) worth trying, the likeliest first.

    Between the plateaus 1/divisor blends 1 and 1/factor with the weight
    w = (turns - low) / (high - low), turns = original * frequency / 2 pi: linear in the frequency.
    One such point gives the length for Llama 3's own high_freq_factor, two give both.
    """
    if original is not None:
        yield original, _HIGH_FREQ_FACTOR
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    largest = factors.max()
    weights = (1 / factors - 1 / largest) / (1 - 1 / largest)
    blended = np.flatnonzero((weights > 1e-4) & (weights < 1 - 1e-4))
    for i in blended:
        turns = _LOW_FREQ_FACTOR + weights[i] * (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
        yield from _length(2 * math.pi * turns / frequencies[i], _HIGH_FREQ_FACTOR)
    if len(set(frequencies[blended])) >= 2:
        slope, offset = np.polyfit(frequencies[blended], weights[blended], 1)
        if slope > 0 and offset < 0:
            band = -_LOW_FREQ_FACTOR / offset
            high = round(_LOW_FREQ_FACTOR + band, 2)
            yield from _length(2 * math.pi * slope * band, high)
    if not len(blended):
        # Nothing in between: any length that separates the plateaus gives the same divisors.
        yield from ((2**power, _HIGH_FREQ_FACTOR) for power in range(5, 24))


def _length(value: float, high: float) -> Iterator[tuple[int, float]]:
    if 1 <= value < 1e9 and high > _LOW_FREQ_FACTOR:
        yield round(value), high


def _factors(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    probe = ModelConfig(
        model_type="llama",
        vocab_size=1,
        hidden_size=head_dim,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=1,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
    )
    return rope_factors(probe)


def rope_factors(config: ModelConfig) -> np.ndarray:
    """[H/2] float32: what Llama 3's scaling divides each frequency by."""
    plain = inverse_frequencies(config.replace(rope_scaling=None))
    return (plain / inverse_frequencies(config)).astype(np.float32)


def scaling_entries(config: ModelConfig) -> list[Entry]:
    """Metadata of the config's scaling; Llama 3's has none, see `rope_factors`.

    Raises ValueError for a scaling that GGUF cannot express.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":
        return []
    if scaling.rope_type == "dynamic":
        raise ValueError(
            "rope_scaling.rope_type is 'dynamic', which GGUF files cannot express; export to "
            "Hugging Face's format, or set rope_scaling to None for contexts up to "
            f"{config.max_position_embeddings}"
        )
    entries = [
        text_entry("rope.scaling.type", scaling.rope_type),
        float32_entry("rope.scaling.factor", scaling.factor),
    ]
    if scaling.rope_type == "linear":
        return entries
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if getattr(scaling, name) is not None:
            raise ValueError(
                f"rope_scaling.{name} is {getattr(scaling, name)}, which GGUF files of the llama "
                f"architecture cannot express; set it to None or export to Hugging Face's format"
            )
    if scaling.truncate is False:
        raise ValueError(
            "rope_scaling.truncate is False, but GGUF's readers always truncate; export to Hugging "
            "Face's format"
        )
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    entries.append(uint32_entry("rope.scaling.original_context_length", original))
    betas = {"yarn_beta_fast": scaling.beta_fast, "yarn_beta_slow": scaling.beta_slow}
    for name, beta in betas.items():
        entries += [] if beta is None else [float32_entry(f"rope.scaling.{name}", beta)]
    return entries
