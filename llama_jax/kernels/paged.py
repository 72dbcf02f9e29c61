"""Attention over pages: rows of any length whose keys and values lie in pages all over one array.

On TPUs this is the ragged paged attention kernel that JAX ships, which reads each row's pages where
they lie. Elsewhere the pages of a row are gathered and attended to in plain JAX: exact, and slow.

Both take pages [P, S, C, W] of S positions with keys and values of a head side by side: key head 0,
value head 0, key head 1, … The kernel wants C, twice the heads of a device, and W, the size of a
head, in sizes that fill registers, so pages may be wider than a model's heads; the rest is zeros.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import LogicalRules
from llama_jax.kernels.few_rows import FEW_TOKENS, few_rows_product, many_rows_product
from llama_jax.mesh.sharding import mesh_axes, partition_spec

# A page that belongs to nobody: what is written there is dropped, what is read is never looked at.
NOWHERE = 0

_LANES = 128  # the width of a TPU register
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# Positions and queries that the kernel takes at a time, about what its authors' table of tuned
# sizes has for most shapes. The table itself asks for the default device, which need not be the
# one that is compiled for.
_BLOCK_POSITIONS = 1024
BLOCK_QUERIES = 32
_VMEM_BYTES = 64 * 2**20
# For page tables: of a mebibyte, what the kernel's other scalars leave.
_SMEM_BYTES = 960 * 2**10


def page_shape(
    kv_heads: int, head_dim: int, dtype: jnp.dtype, *, parts: int, kernel: bool
) -> tuple[int, int]:
    """(C, W) of pages whose heads are dealt out to `parts` devices."""
    if not kernel:
        return 2 * kv_heads, head_dim
    # A register holds 32 bits of one column; heads come in 1, 2, 4 or whole eights of those.
    packed = max(4 // dtype.itemsize, 1)
    registers = -(-2 * kv_heads // parts // packed)
    registers = next((n for n in (1, 2, 4) if n >= registers), -(-registers // 8) * 8)
    return parts * registers * packed, -(-head_dim // _LANES) * _LANES


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    pages: Float[Array, "P S C W"],
    tables: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    first: Int[Array, ""],
    *,
    sliding_window: int | None,
    rules: LogicalRules,
    kernel: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "P S C W"]]:
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
    nothing = partition_spec(())
    return jax.shard_map(
        run,
        in_specs=(heads[0], heads[1], heads[1], heads[1], nothing, nothing, nothing),
        out_specs=(heads[0], heads[1]),
        check_vma=False,
    )(*operands)


def check_tables(rows: int, pages_per_row: int) -> None:
    """Raises ValueError for more entries of page tables than the kernel's scalar memory holds."""
    entries = rows * -(-pages_per_row // _LANES) * _LANES
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
    pages: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    first: jax.Array,
    *,
    sliding_window: int | None,
    kernel: bool,
) -> tuple[jax.Array, jax.Array]:
    pages = _write(pages, key, value, tables, positions, first)
    run = _kernel if kernel else _reference
    return run(query, pages, tables + first, positions, key.shape[2], sliding_window), pages


def _write(
    pages: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    first: jax.Array,
) -> jax.Array:
    count, size, width, wide = pages.shape
    pairs = jnp.stack([key, value], axis=3).astype(pages.dtype)
    pairs = pairs.reshape(positions.size, 2 * key.shape[2], key.shape[3])
    pairs = jnp.pad(pairs, [(0, 0), (0, width - pairs.shape[1]), (0, wide - pairs.shape[2])])
    page = jnp.take_along_axis(tables, positions // size, axis=1)
    page = jnp.where(page == NOWHERE, count, page + first)
    return pages.at[page.reshape(-1), (positions % size).reshape(-1)].set(pairs, mode="drop")


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
        vmem_limit_bytes=_VMEM_BYTES,
    )
    mixed = mixed.reshape(batch, length, width // 2, groups, wide)[:, :, :kv_heads, :, :size]
    return mixed.reshape(query.shape).astype(query.dtype)


def _reference(
    query: jax.Array,
    pages: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    kv_heads: int,
    sliding_window: int | None,
) -> jax.Array:
    batch, length, heads, size = query.shape
    held = pages[tables][..., : 2 * kv_heads, :size].reshape(batch, -1, kv_heads, 2, size)
    places = jnp.arange(held.shape[1], dtype=jnp.int32)
    seen = places <= positions[:, :, None]  # [B, T, positions]
    # What nobody has written yet may be anything; zero times that need not be zero.
    held = jnp.where(seen[:, -1, :, None, None, None], held, 0)
    if sliding_window is not None:
        seen &= places > positions[:, :, None] - sliding_window
    keys, values = held[:, :, :, 0].transpose(0, 2, 3, 1), held[:, :, :, 1].transpose(0, 2, 1, 3)
    groups = heads // kv_heads
    folded = query.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, kv_heads, groups * length, size).astype(pages.dtype)
    multiply = few_rows_product if length <= FEW_TOKENS else many_rows_product
    seen = jnp.tile(seen, (1, groups, 1))[:, None]  # of the folded queries
    scores = jnp.where(seen, multiply(folded, keys) * size**-0.5, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(pages.dtype)
    mixed = multiply(weights, values).reshape(batch, kv_heads, groups, length, size)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)
