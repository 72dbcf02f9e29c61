"""The two orders of query and key rows: Meta's and Hugging Face's.

Rotary embedding turns pairs of rows of each head. Meta's files (and GGUF files of the llama
architecture) keep a pair's rows side by side; Hugging Face keeps all first rows of a head's pairs
and then all second rows. Only q_proj and k_proj, weights and biases, differ between the two: values
and outputs are not rotated.
"""

from typing import TypeVar

import jax
import numpy as np

Rows = TypeVar("Rows", np.ndarray, jax.Array)


def meta_to_hf(rows: Rows, num_heads: int) -> Rows:
    """Reorders [heads * head_dim, ...]: within each head rows (0, 1, 2, 3) become (0, 2, 1, 3).

    `num_heads` is that of the matrix: for k_proj the number of key/value heads.
    """
    pairs = rows.reshape(num_heads, _half(rows, num_heads), 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def hf_to_meta(rows: Rows, num_heads: int) -> Rows:
    """The inverse of `meta_to_hf`."""
    halves = rows.reshape(num_heads, 2, _half(rows, num_heads), *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _half(rows: Rows, num_heads: int) -> int:
    half, remainder = divmod(rows.shape[0], 2 * num_heads)
    if remainder:
        raise ValueError(
            f"{rows.shape[0]} rows do not make {num_heads} heads of an even size; q_proj takes "
            f"num_attention_heads, k_proj num_key_value_heads"
        )
    return half
