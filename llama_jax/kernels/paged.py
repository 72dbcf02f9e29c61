"""Attention over pages: rows of any length whose keys and values lie in pages all over one array.

On TPUs kernels read each row's pages where they lie: of floats the ragged paged attention that JAX
ships, of int8 our own (`paged_int8.py`). Elsewhere the pages of a row are gathered and attended to
in plain JAX: exact, and slow.

Keys and values of a head lie side by side: key head 0, value head 0, key head 1, …; C of them.
Pages of floats are [P, S, C, W], with S positions, as JAX's kernel wants them. It wants C, and W,
the size of a head, to fill registers, so pages may be larger than a model's heads; the rest is
zeros. Pages of int8 are [P, C, S, W], a matrix for each head, with scales [P, C, S], in which C is
filled up.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import LogicalRules, ModelConfig
from llama_jax.kernels.few_rows import FEW_TOKENS, MASKED, few_rows_product, many_rows_product
from llama_jax.kernels.paged_int8 import (
    BLOCK_QUERIES,
    LANES,
    VMEM_BYTES,
    int8_paged_attention,
)
from llama_jax.kernels.rounded import Rounded, rounded
from llama_jax.mesh.sharding import mesh_axes, partition_spec

Pages = jax.Array | Rounded

# A page that belongs to nobody: what is written there is dropped, what is read is never looked at.
NOWHERE = 0

# Positions that the kernel takes at a time, and queries, about what its authors' table of tuned
# sizes has for most shapes. The table itself asks for the default device, which need not be the
# one that is compiled for.
_BLOCK_POSITIONS = 1024
# For page tables: of a mebibyte, what the kernel's other scalars leave.
_SMEM_BYTES = 960 * 2**10


def page_shape(
    kv_heads: int, head_dim: int, dtype: jnp.dtype, *, parts: int, kernel: bool
) -> tuple[int, int]:
    """(C, W) of pages whose heads are dealt out to `parts` devices."""
    if not kernel:
        return 2 * kv_heads, head_dim
    # A register holds 32 bits of one column.
    packed = max(4 // dtype.itemsize, 1)
    rows = _whole_registers(-(-2 * kv_heads // parts // packed))
    return parts * rows * packed, _whole_lanes(head_dim)


def _whole_registers(rows: int) -> int:
    """Of 32 bits they come in 1, 2, 4 or whole eights."""
    return next((n for n in (1, 2, 4) if n >= rows), -(-rows // 8) * 8)


def empty_pages(
    config: ModelConfig, num_pages: int, page_size: int, dtype: str, *, parts: int, kernel: bool
) -> Pages:
    """Zeros. dtype: a float's name, or int8. parts: devices that the heads are dealt out to; they
    get equal parts of each array. kernel: whether a TPU's kernel reads them.

    Raises ValueError for pages that the kernel cannot read, and for more than can be counted.
    """
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    if dtype != "int8":
        width, wide = page_shape(kv_heads, head_dim, jnp.dtype(dtype), parts=parts, kernel=kernel)
        return jnp.zeros((num_pages, page_size, width, wide), jnp.dtype(dtype))
    if kernel and page_size % LANES:
        raise ValueError(
            f"block_size is {page_size}; pages of int8 on a TPU need a multiple of {LANES}, for "
            f"their scales lie in registers of so many"
        )
    if (num_pages + 1) * (2 * kv_heads // parts) * page_size >= 2**31:
        raise ValueError(
            f"{num_pages} pages of {page_size} positions are more than are counted in 32 bits for "
            f"{2 * kv_heads // parts} heads of keys and values; give fewer blocks"
        )
    wide, rows = head_dim, 2 * kv_heads
    if kernel:
        wide, rows = _whole_lanes(head_dim), parts * _whole_registers(2 * kv_heads // parts)
    codes = jnp.zeros((num_pages, 2 * kv_heads, page_size, wide), jnp.int8)
    return Rounded(codes, jnp.zeros((num_pages, rows, page_size), jnp.float32))


def with_axes(function: Callable[[Any, tuple[str | None, ...]], Any], pages: Any) -> Any:
    """`function` of each array and its logical axes."""
    if not isinstance(pages, Rounded):
        return function(pages, (None, None, "kv_heads", None))
    codes = function(pages.codes, (None, "kv_heads", None, None))
    return Rounded(codes, function(pages.scale, (None, "kv_heads", None)))


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    pages: Pages,
    tables: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    first: Int[Array, ""],
    *,
    sliding_window: int | None,
    rules: LogicalRules,
    kernel: bool,
) -> tuple[Float[Array, "B T N H"], Pages]:
    """Writes the new keys and values, then lets each query see its row up to its own position:
    (mixed values, the pages).

    tables: the pages of each row in order, counted from page `first` of the array; NOWHERE where
    it has none. positions: consecutive in each row.
    """
    run = partial(_on_device, sliding_window=sliding_window, kernel=kernel)
    operands = query, key, value, pages, tables, positions, first
    if jax.sharding.get_abstract_mesh().empty:
        return run(*operands)
    # Each device has some heads, of queries and of pages, and needs no others.
    heads = [partition_spec((None, None, name, None), rules) for name in ("heads", "kv_heads")]
    of_pages = with_axes(lambda _, axes: partition_spec(axes, rules), pages)
    nothing = partition_spec(())
    return jax.shard_map(
        run,
        in_specs=(heads[0], heads[1], heads[1], of_pages, nothing, nothing, nothing),
        out_specs=(heads[0], of_pages),
        check_vma=False,
    )(*operands)


def check_tables(rows: int, pages_per_row: int) -> None:
    """Raises ValueError for more entries of page tables than the kernel's scalar memory holds."""
    entries = rows * -(-pages_per_row // LANES) * LANES
    if 4 * entries > _SMEM_BYTES:
        raise ValueError(
            f"the tables of {rows} rows of {pages_per_row} pages take {4 * entries} bytes, and a "
            f"TPU's scalar memory holds {_SMEM_BYTES}; make pages larger (block_size), or rows "
            f"fewer or shorter"
        )


def check_heads(num_heads: int, kv_heads: int, mesh: jax.sharding.Mesh, rules: LogicalRules) -> int:
    """Over how many devices key and value heads are dealt out. Raises ValueError where a device
    would get query heads without theirs."""
    query, kv = (
        math.prod(mesh.shape[axis] for axis in mesh_axes(rules, name))
        for name in ("heads", "kv_heads")
    )
    if num_heads % query or kv_heads % kv or (query != kv and kv != kv_heads):
        raise ValueError(
            f"{num_heads} query heads and {kv_heads} key/value heads cannot be dealt out to "
            f"{query} and {kv} devices: mesh.tensor must divide {kv_heads}, and with mesh.fsdp "
            f"above 1 be {kv_heads}, and their product must divide {num_heads}"
        )
    return kv


def _on_device(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pages: Pages,
    tables: jax.Array,
    positions: jax.Array,
    first: jax.Array,
    *,
    sliding_window: int | None,
    kernel: bool,
) -> tuple[jax.Array, Pages]:
    pages = _write(pages, key, value, tables, positions, first)
    run: Callable[..., jax.Array] = _reference
    if kernel:
        run = _int8_kernel if isinstance(pages, Rounded) else _kernel
    return run(query, pages, tables + first, positions, key.shape[2], sliding_window), pages


def _write(
    pages: Pages,
    key: jax.Array,
    value: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    first: jax.Array,
) -> Pages:
    count, size = pages.shape[0], pages.shape[2 if isinstance(pages, Rounded) else 1]
    pairs = jnp.stack([key, value], axis=3)
    pairs = pairs.reshape(positions.size, 2 * key.shape[2], key.shape[3])
    page = jnp.take_along_axis(tables, positions // size, axis=1)
    page = jnp.where(page == NOWHERE, count, page + first).reshape(-1)
    place = (positions % size).reshape(-1)
    if not isinstance(pages, Rounded):
        pairs = _filled(pairs.astype(pages.dtype), *pages.shape[2:])
        return pages.at[page, place].set(pairs, mode="drop")
    new = rounded(pairs)
    width = pairs.shape[1]
    codes = _filled(new.codes, *pages.codes.shape[1::2])
    # As one long matrix: a TPU would turn pages about for two axes, and copy them all.
    rows = pages.codes.reshape(-1, pages.codes.shape[-1])
    heads = (page[:, None] * width + jnp.arange(width, dtype=jnp.int32)) * size
    rows = rows.at[heads + place[:, None]].set(codes, mode="drop")
    scale = new.scale.reshape(*positions.shape, width)
    scale = _with_scales(pages.scale, scale, tables, positions, first)
    return Rounded(rows.reshape(pages.codes.shape), scale)


def _with_scales(
    scales: Float[Array, "P C S"],
    new: Float[Array, "B T C"],
    tables: jax.Array,
    positions: jax.Array,
    first: jax.Array,
) -> Float[Array, "P C S"]:
    """New ones in their places. Whole pages are read and written: single numbers, scattered, a TPU
    puts into a copy of all scales that it lays out otherwise."""
    count, width, size = scales.shape
    batch, length, heads = new.shape
    new = jnp.pad(new, [(0, 0), (0, 0), (0, width - heads)])
    begins = positions[:, :1]
    # The pages that as many consecutive positions can touch.
    numbers = begins // size + jnp.arange((length - 2) // size + 2, dtype=jnp.int32)
    touched = jnp.minimum(numbers, tables.shape[1] - 1)
    page = jnp.take_along_axis(tables, touched, axis=1)
    is_held = (page != NOWHERE) & (numbers == touched) & (numbers <= positions[:, -1:] // size)
    tokens = numbers[:, :, None] * size + jnp.arange(size, dtype=jnp.int32) - begins[:, :, None]
    theirs = jnp.take_along_axis(new, jnp.clip(tokens, 0, length - 1).reshape(batch, -1, 1), axis=1)
    theirs = theirs.reshape(*tokens.shape, width).swapaxes(2, 3)
    is_new = ((tokens >= 0) & (tokens < length))[:, :, None]
    both = jnp.where(is_new, theirs, scales[page + first])
    return scales.at[jnp.where(is_held, page + first, count)].set(both, mode="drop")


def _filled(pairs: jax.Array, width: int, wide: int) -> jax.Array:
    """Zeros behind heads and numbers [n, C, W]."""
    return jnp.pad(pairs, [(0, 0), (0, width - pairs.shape[1]), (0, wide - pairs.shape[2])])


def _whole_lanes(size: int) -> int:
    return -(-size // LANES) * LANES


def _int8_kernel(
    query: jax.Array,
    pages: Rounded,
    tables: jax.Array,
    positions: jax.Array,
    kv_heads: int,
    sliding_window: int | None,
) -> jax.Array:
    del kv_heads  # these pages have no others
    size, wide = query.shape[-1], pages.codes.shape[-1]
    mixed = int8_paged_attention(
        jnp.pad(query, [(0, 0), (0, 0), (0, 0), (0, wide - size)]),
        pages.codes,
        pages.scale,
        tables,
        positions[:, -1] + 1,
        sm_scale=size**-0.5,
        sliding_window=sliding_window,
    )
    return mixed[..., :size]


def _kernel(
    query: jax.Array,
    pages: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    kv_heads: int,
    sliding_window: int | None,
) -> jax.Array:
    # Imported where it is used: Pallas takes a third of a second, which no CPU run needs.
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

    batch, length, heads, size = query.shape
    _, page_size, width, wide = pages.shape
    groups = heads // kv_heads
    padded = query.reshape(batch * length, kv_heads, groups, size)
    missing = (width // 2 - kv_heads, wide - size)
    padded = jnp.pad(padded, [(0, 0), (0, missing[0]), (0, 0), (0, missing[1])])
    mixed = ragged.ragged_paged_attention(
        padded.reshape(batch * length, -1, wide).astype(pages.dtype),
        pages,
        positions[:, -1] + 1,
        tables,
        jnp.arange(batch + 1, dtype=jnp.int32) * length,
        jnp.full((1,), batch, jnp.int32),
        sm_scale=size**-0.5,
        sliding_window=sliding_window,
        num_kv_pages_per_block=min(tables.shape[1], max(1, _BLOCK_POSITIONS // page_size)),
        num_queries_per_block=min(batch * length, BLOCK_QUERIES),
        vmem_limit_bytes=VMEM_BYTES,
    )
    mixed = mixed.reshape(batch, length, width // 2, groups, wide)[:, :, :kv_heads, :, :size]
    return mixed.reshape(query.shape).astype(query.dtype)


def _reference(
    query: jax.Array,
    pages: Pages,
    tables: jax.Array,
    positions: jax.Array,
    kv_heads: int,
    sliding_window: int | None,
) -> jax.Array:
    batch, length, heads, size = query.shape
    held = _gathered(pages, tables, 2 * kv_heads, size, query.dtype)
    held = held.reshape(batch, -1, kv_heads, 2, size)
    places = jnp.arange(held.shape[1], dtype=jnp.int32)
    seen = places <= positions[:, :, None]  # [B, T, positions]
    # What nobody has written yet may be anything; zero times that need not be zero.
    held = jnp.where(seen[:, -1, :, None, None, None], held, 0)
    if sliding_window is not None:
        seen &= places > positions[:, :, None] - sliding_window
    keys, values = held[:, :, :, 0].transpose(0, 2, 3, 1), held[:, :, :, 1].transpose(0, 2, 1, 3)
    groups = heads // kv_heads
    folded = query.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, kv_heads, groups * length, size).astype(held.dtype)
    multiply = few_rows_product if length <= FEW_TOKENS else many_rows_product
    seen = jnp.tile(seen, (1, groups, 1))[:, None]  # of the folded queries
    scores = jnp.where(seen, multiply(folded, keys) * size**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(held.dtype)
    mixed = multiply(weights, values).reshape(batch, kv_heads, groups, length, size)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)


def _gathered(
    pages: Pages, tables: jax.Array, width: int, size: int, dtype: jnp.dtype
) -> Float[Array, "B S C H"]:
    """Keys and values of each row; of int8 the numbers that they stand for."""
    if not isinstance(pages, Rounded):
        return pages[tables][..., :width, :size].reshape(len(tables), -1, width, size)
    codes = pages.codes[tables][..., :size]
    scale = pages.scale[tables][:, :, :width, :, None]
    held = (codes.astype(jnp.float32) * scale).astype(dtype).swapaxes(2, 3)
    return held.reshape(len(tables), -1, width, size)
