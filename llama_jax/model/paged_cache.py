"""A key/value cache of pages for continuous batching on TPUs: rows hold pages, in any order.

A page is a block of the block manager. Rows that begin alike hold the same pages, so nothing is
copied when a prefix is shared; a row that ends leaves its pages to others.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import LogicalRules, ModelConfig
from llama_jax.kernels import paged
from llama_jax.mesh.sharding import constrain

NOWHERE = paged.NOWHERE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageRows:
    """What a step runs. tables: [B, M], the pages of each row in order, NOWHERE where it has none.
    positions: [B, T], of its tokens, consecutive; those that only fill a step up stand behind the
    others, and are written where the row has a page for them, to be overwritten. ends: [B], tokens
    of each row once the step's own are in."""

    tables: Int[Array, "B M"]
    positions: Int[Array, "B T"]
    ends: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """pages: [L * P, S, C, W], the P pages of layer 0, then those of layer 1, …; the layers that
    have run are counted in `layer`. `rows` says what the next step does. kernel: whether a TPU
    kernel reads the pages."""

    pages: Float[Array, "LP S C W"]
    layer: Int[Array, ""]
    rows: PageRows | None = None
    num_pages: int = field(default=0, metadata={"static": True})
    kernel: bool = field(default=False, metadata={"static": True})


def init_paged_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    *,
    dtype: Any,
    kernel: bool,
    rules: LogicalRules,
    parts: int = 1,
) -> PagedCache:
    """`num_pages` empty pages in each layer, of which page NOWHERE is nobody's. parts: devices that
    share the heads, by the rules and the mesh in force."""
    dtype = jnp.dtype(dtype)
    heads, size = paged.page_shape(
        config.num_key_value_heads, config.head_dim, dtype, parts=parts, kernel=kernel
    )
    shape = (config.num_hidden_layers * num_pages, page_size, heads, size)
    pages = constrain(jnp.zeros(shape, dtype), (None, None, "kv_heads", None), rules)
    return PagedCache(pages, jnp.int32(0), num_pages=num_pages, kernel=kernel)


def attend_pages(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    cache: PagedCache,
    *,
    sliding_window: int | None,
    rules: LogicalRules,
) -> tuple[Float[Array, "B T N H"], PagedCache]:
    """One layer: writes the new keys and values, then attends: (mixed values, the cache for the
    next layer)."""
    assert cache.rows is not None
    mixed, pages = paged.attend(
        query,
        key,
        value,
        cache.pages,
        cache.rows.tables,
        cache.rows.positions,
        cache.layer * cache.num_pages,
        sliding_window=sliding_window,
        rules=rules,
        kernel=cache.kernel,
    )
    return mixed, dataclasses.replace(cache, pages=pages, layer=cache.layer + 1)


def read_pages(cache: PagedCache, ids: Int[Array, " M"]) -> Float[Array, "L M S C W"]:
    """The content of some pages in every layer."""
    return _by_layer(cache)[:, ids]


def write_pages(
    cache: PagedCache, ids: Int[Array, " M"], content: Float[Array, "L M S C W"]
) -> PagedCache:
    """Puts back what `read_pages` took out, into other pages; none where an id is NOWHERE."""
    ids = jnp.where(ids == NOWHERE, cache.num_pages, ids)
    pages = _by_layer(cache).at[:, ids].set(content, mode="drop").reshape(cache.pages.shape)
    return dataclasses.replace(cache, pages=pages)


def _by_layer(cache: PagedCache) -> jax.Array:
    return cache.pages.reshape(-1, cache.num_pages, *cache.pages.shape[1:])
