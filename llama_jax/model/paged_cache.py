"""A key/value cache of pages for continuous batching on TPUs: rows hold pages, in any order.

A page is a block of the block manager. Rows that begin alike hold the same pages, so nothing is
copied when a prefix is shared; a row that ends leaves its pages to others.
"""

import dataclasses
from dataclasses import dataclass, field

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
    """pages: [L * P, …], the P pages of layer 0, then those of layer 1, …; the layers that have run
    are counted in `layer`. `rows` says what the next step does. kernel: whether a TPU kernel reads
    the pages."""

    pages: paged.Pages
    layer: Int[Array, ""]
    rows: PageRows | None = None
    num_pages: int = field(default=0, metadata={"static": True})
    kernel: bool = field(default=False, metadata={"static": True})


def init_paged_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    *,
    dtype: str,
    kernel: bool,
    rules: LogicalRules,
    parts: int = 1,
) -> PagedCache:
    """`num_pages` empty pages in each layer, of which page NOWHERE is nobody's. dtype, parts: as in
    `paged.empty_pages`; the devices are those of the rules and the mesh in force."""
    pages = paged.empty_pages(
        config, config.num_hidden_layers * num_pages, page_size, dtype, parts=parts, kernel=kernel
    )
    pages = paged.with_axes(lambda array, axes: constrain(array, axes, rules), pages)
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


def read_pages(cache: PagedCache, ids: Int[Array, " M"]) -> paged.Pages:
    """The content of some pages in every layer: [L, M, …]."""
    return jax.tree.map(lambda array: _by_layer(array, cache)[:, ids], cache.pages)


def write_pages(cache: PagedCache, ids: Int[Array, " M"], content: paged.Pages) -> PagedCache:
    """Puts back what `read_pages` took out, into other pages; none where an id is NOWHERE."""
    ids = jnp.where(ids == NOWHERE, cache.num_pages, ids)

    def write(array: jax.Array, part: jax.Array) -> jax.Array:
        return _by_layer(array, cache).at[:, ids].set(part, mode="drop").reshape(array.shape)

    return dataclasses.replace(cache, pages=jax.tree.map(write, cache.pages, content))


def _by_layer(array: jax.Array, cache: PagedCache) -> jax.Array:
    return array.reshape(-1, cache.num_pages, *array.shape[1:])
