"""The compiled steps of the engine over pages; sampling and its memory are in `steps.py`."""

import dataclasses
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from infer.engine import steps
from llama_jax.config import Compute, ModelConfig
from llama_jax.model import paged_cache
from llama_jax.model.paged_cache import PagedCache, PageRows


@partial(
    jax.jit,
    static_argnames=("config", "compute", "num_pages", "page_size", "dtype", "kernel", "parts"),
)
def new_pages(
    config: ModelConfig,
    *,
    compute: Compute,
    num_pages: int,
    page_size: int,
    dtype: str,
    kernel: bool,
    parts: int,
) -> PagedCache:
    return paged_cache.init_paged_cache(
        config,
        num_pages,
        page_size,
        dtype=dtype,
        kernel=kernel,
        rules=compute.rules,
        parts=parts,
    )


@partial(jax.jit, static_argnames=("config", "compute"), donate_argnames=("cache",))
def read_piece(
    config: ModelConfig,
    params: Any,
    cache: PagedCache,
    tokens: Int[Array, " T"],
    table: Int[Array, " M"],
    begin: Int[Array, ""],
    num_real: Int[Array, ""],
    adapter: Int[Array, ""],
    *,
    compute: Compute,
) -> tuple[PagedCache, Float[Array, "T D"], Float[Array, " D"]]:
    """Runs tokens at positions begin, … of a row with the pages `table`, of which the first
    num_real are real. Gives the final states, and the sum of the real ones in float32."""
    rows = PageRows(table[None], (begin + steps.places_of(tokens))[None], (begin + num_real)[None])
    cache = dataclasses.replace(cache, rows=rows)
    return steps.piece_of(config, params, cache, tokens, num_real, adapter, compute=compute)


@partial(jax.jit, static_argnames=("config", "compute"), donate_argnames=("cache",))
def run_tokens(
    config: ModelConfig,
    params: Any,
    cache: PagedCache,
    tokens: Int[Array, "B T"],
    rows: PageRows,
    adapters: Int[Array, " B"],
    *,
    compute: Compute,
) -> tuple[PagedCache, Float[Array, "BT V"]]:
    """Runs tokens of B rows, each with its adapter (negative: none); logits after each."""
    cache = dataclasses.replace(cache, rows=rows)
    return steps.logits_of(config, params, cache, tokens, adapters, compute=compute)


read_pages = jax.jit(paged_cache.read_pages)
write_pages = jax.jit(paged_cache.write_pages, donate_argnums=0)
