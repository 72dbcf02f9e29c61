"""cuDNN's flash attention, which JAX calls on NVIDIA GPUs: it never holds the scores."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from llama_jax.config import LogicalRules
from llama_jax.mesh.sequence import length_parts

_HEAD_UNIT = 8


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    sliding_window: int | None,
    rules: LogicalRules,
    implementation: Any = "cudnn",
) -> Float[Array, "B T N H"]:
    """Causal attention within segments, equal to `model.attention.attend` up to rounding, in
    bfloat16 or float16 (`jax.nn.dot_product_attention`).

    Rows and heads stay on their devices. cuDNN knows no segments: which of a row's tokens may see
    each other goes in as an array [B, 1, T, T]. `implementation` is `xla` where a test has no GPU.

    Raises ValueError for sequences that the mesh divides and for shapes that cuDNN does not take;
    those that only some GPUs take JAX refuses.
    """
    length, size = query.shape[1], query.shape[-1]
    instead = "set compute.attention to reference"
    if length_parts(rules) > 1:
        raise ValueError(
            f"cudnn attention needs whole sequences, which mesh.context divides; set that to 1, or "
            f"{instead}"
        )
    if size % _HEAD_UNIT:
        raise ValueError(
            f"cudnn attention needs a head_dim that is a multiple of {_HEAD_UNIT}, not {size}; "
            f"{instead}"
        )
    mask = None
    if segment_ids is not None:
        if length % 2:
            raise ValueError(
                f"cudnn attention needs a sequence length that is a multiple of 2, not {length}; "
                f"{instead}"
            )
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation=implementation,
    )
