"""The compiled steps of the engine over pages; sampling and its memory are in `steps.py`."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from infer.engine.adapters import with_chosen
from llama_jax.config import Compute, ModelConfig
from llama_jax.model import paged_cache, transformer
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
    places = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    rows = PageRows(table[None], (begin + places)[None], (begin + num_real)[None])
    params = with_chosen(params, adapter[None], length=tokens.shape[0])
    hidden, after, _ = transformer.hidden_states(
        config, params, tokens[None], compute=compute, cache=dataclasses.replace(cache, rows=rows)
    )
    real = (places < num_real)[:, None]
    total = jnp.where(real, hidden[0].astype(jnp.float32), 0.0).sum(axis=0)
    return dataclasses.replace(after, rows=None), hidden[0], total


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
    params = with_chosen(params, adapters, length=tokens.shape[1])
    hidden, after, _ = transformer.hidden_states(
        config, params, tokens, compute=compute, cache=dataclasses.replace(cache, rows=rows)
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = transformer.logits(config, params, flat, compute=compute)
    return dataclasses.replace(after, rows=None), logits


read_pages = jax.jit(paged_cache.read_pages)
write_pages = jax.jit(paged_cache.write_pages, donate_argnums=0)
