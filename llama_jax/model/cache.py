"""The key/value cache: allocated once, updated in place.

All rows write at one shared cursor, so a step's update is one contiguous slice whatever the
lengths of the rows. Each slot remembers the position of the token it holds; padding holds `NEVER`,
a position no query reaches. Rows are thereby independent: what a query sees follows from the
positions of its own row alone.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llama_jax.config import ModelConfig
from llama_jax.kernels.rounded import Held, as_held, empty

# `Held`, stacked [L, ...] for scanned layers, or a tuple of L for unrolled ones.
Layers = Any

NEVER = int(np.iinfo(np.int32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """keys: [B, K, H, S] for each layer, already rotated; values: [B, K, S, H];
    positions: [B, S], the position of the token in each slot, NEVER where there is none;
    lengths: [B], tokens each row holds; cursor: [], the slot the next token of every row takes."""

    keys: Layers
    values: Layers
    positions: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    cursor: Int[Array, ""]

    @property
    def is_stacked(self) -> bool:
        return not isinstance(self.keys, tuple)

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.positions.shape[1]

    def extend(self, real: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], "KVCache"]:
        """Makes room for T tokens: (their positions, the cache with its bookkeeping advanced).

        real: 1 for tokens, 0 for padding on the right. Keys and values are written by the layers,
        from the old cursor.
        """
        positions = self.lengths[:, None] + jnp.arange(real.shape[1], dtype=jnp.int32)
        seen = jnp.where(real > 0, positions, NEVER)
        return positions, dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice(self.positions, seen, (0, self.cursor)),
            lengths=self.lengths + real.sum(axis=1, dtype=jnp.int32),
            cursor=self.cursor + real.shape[1],
        )


def init_cache(
    config: ModelConfig, batch: int, capacity: int, *, dtype: str = "float32", stacked: bool
) -> KVCache:
    """An empty cache for `batch` rows and `capacity` slots, padding included; dtype: a float's
    name, or int8."""
    heads, size, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers

    def side(*shape: int, head_axis: int) -> Layers:
        shape = (batch, heads, *shape)
        if stacked:
            return empty((layers, *shape), head_axis=head_axis, dtype=dtype)
        return tuple(empty(shape, head_axis=head_axis, dtype=dtype) for _ in range(layers))

    return KVCache(
        keys=side(size, capacity, head_axis=-2),
        values=side(capacity, size, head_axis=-1),
        positions=jnp.full((batch, capacity), NEVER, jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
    )


def write_keys(layer: Held, new: jax.Array, cursor: Int[Array, ""]) -> Held:
    """Puts new [B, T, K, H] into layer [B, K, H, S] at the cursor.

    Keys lie with slots innermost, the order in which a step's scores are computed.
    """

    def write(array: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(array, part.transpose(0, 2, 3, 1), (0, 0, 0, cursor))

    written: Held = jax.tree.map(write, layer, as_held(new, layer))
    return written


def write_values(layer: Held, new: jax.Array, cursor: Int[Array, ""]) -> Held:
    """Puts new [B, T, K, H] into layer [B, K, S, H] at the cursor."""

    def write(array: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(array, part.transpose(0, 2, 1, 3), (0, 0, cursor, 0))

    written: Held = jax.tree.map(write, layer, as_held(new, layer))
    return written
