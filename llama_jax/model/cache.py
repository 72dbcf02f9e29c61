"""The key/value cache: allocated once, updated in place.

Rows are independent: each has its own length, and slot s of a row always holds position s. Prompts
are padded on the right; what padding wrote lies at positions no query has reached yet, so it is
never seen and is overwritten when its position comes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from llama_jax.config import ModelConfig

# Stacked [L, B, K, S, H] for scanned layers, or a tuple of L arrays [B, K, S, H] for unrolled ones.
Layers = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """keys and values: [L, B, K, S, H] or L times [B, K, S, H], keys already rotated;
    lengths: [B] int32, the number of tokens each row holds."""

    keys: Layers
    values: Layers
    lengths: Int[Array, " B"]

    @property
    def is_stacked(self) -> bool:
        return not isinstance(self.keys, tuple)

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.keys.shape[-2] if self.is_stacked else self.keys[0].shape[-2]

    def positions(self, num_tokens: int) -> Int[Array, "B T"]:
        """The positions of the next `num_tokens` tokens of each row."""
        return self.lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)

    def advance(self, num_tokens: Int[Array, " B"]) -> "KVCache":
        return dataclasses.replace(self, lengths=self.lengths + num_tokens)


def init_cache(
    config: ModelConfig, batch: int, capacity: int, *, dtype: Any = jnp.float32, stacked: bool
) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens."""
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    layers = config.num_hidden_layers
    lengths = jnp.zeros((batch,), jnp.int32)
    if stacked:
        return KVCache(
            jnp.zeros((layers, *shape), dtype), jnp.zeros((layers, *shape), dtype), lengths
        )
    return KVCache(
        tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
        lengths,
    )


def write(layer: jax.Array, new: jax.Array, starts: Int[Array, " B"]) -> jax.Array:
    """Puts new [B, T, K, H] into layer [B, K, S, H] from slot starts[b] of each row."""
    new = new.transpose(0, 2, 1, 3).astype(layer.dtype)
    return jax.vmap(lambda row, update, at: jax.lax.dynamic_update_slice(row, update, (0, at, 0)))(
        layer, new, starts
    )
