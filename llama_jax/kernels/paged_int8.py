"""Attention over pages of int8 numbers with a scale for each head of each token, for TPUs.

JAX's paged kernels know one scale for a whole cache, or write scales out as wide as the numbers.
This one reads both as they lie: a row's pages, a tile of them at a time, with a running softmax
(Dao et al. 2022, arXiv:2205.14135). A score is multiplied by its key's scale, a weight by its
value's, so the numbers themselves go into the products as they are; up to 127 a bfloat16 holds them
exactly.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from llama_jax.kernels.few_rows import MASKED

# Positions read at a time, and queries of a row that read them together: what a v4 has room for.
_TILE = 512
BLOCK_QUERIES = 32
VMEM_BYTES = 64 * 2**20
LANES = 128  # the width of a TPU register


def int8_paged_attention(
    query: Float[Array, "B T N H"],
    codes: Int8[Array, "P C S H"],
    scales: Float[Array, "P C S"],
    tables: Int[Array, "B M"],
    ends: Int[Array, " B"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Mixed values of T queries a row, the last of them at position ends - 1, each of which sees
    its row up to itself.

    codes, scales: of key head 0, value head 0, key head 1, …, and scales of no heads behind them. A
    TPU wants S and H to be multiples of 128.
    tables: each row's pages in order; what lies behind its end is read by nobody. interpret: run
    elsewhere than on a TPU, for tests.
    """
    batch, length, heads, size = query.shape
    _, both, page_size, _ = codes.shape
    kv_heads = both // 2
    groups = heads // kv_heads
    per_tile = max(1, min(tables.shape[1], _TILE // page_size))
    block = min(length, BLOCK_QUERIES)
    parts = -(-length // block)
    rows = block * groups

    # Behind the last query of a row stand some that nobody asked for, where blocks are not full.
    folded = jnp.pad(query, [(0, 0), (0, parts * block - length), (0, 0), (0, 0)])
    folded = folded.reshape(batch, -1, kv_heads, groups, size).transpose(0, 2, 1, 3, 4)
    folded = folded.reshape(batch, kv_heads, -1, size)

    def page_of(number: int) -> Any:
        def index(row: Any, part: Any, tile: Any, tables: Any, ends: Any) -> tuple[Any, ...]:
            # Outside of what the queries see, the nearest page again: it is there already.
            last = _last(ends[row], length, part, block)
            first = 0 if sliding_window is None else last - block + 1 - sliding_window + 1
            pages = _divided(jnp.maximum(first, 0), page_size), _divided(last, page_size)
            place = jnp.clip(tile * per_tile + number, *pages)
            return tables[row, jnp.minimum(place, tables.shape[1] - 1)]

        return index

    def of_page(shape: tuple[int, ...], number: int) -> Any:
        page = page_of(number)
        return pl.BlockSpec((1, *shape), lambda *at: (page(*at), *(0 for _ in shape)))

    def of_queries(row: Any, part: Any, tile: Any, tables: Any, ends: Any) -> tuple[Any, ...]:
        return row, 0, part, 0

    # Imported where it is used: Pallas takes a third of a second, which no CPU run needs.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    queries = pl.BlockSpec((1, kv_heads, rows, size), of_queries)
    numbers = range(per_tile)
    tiles = pl.cdiv(jnp.minimum(ends.max(), tables.shape[1] * page_size), per_tile * page_size)
    mixed = pl.pallas_call(
        functools.partial(
            _kernel,
            per_tile=per_tile,
            length=length,
            block=block,
            groups=groups,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, parts, tiles),
            in_specs=[
                queries,
                *[of_page((both, page_size, size), n) for n in numbers],
                *[of_page(scales.shape[1:], n) for n in numbers],
            ],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, size), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(folded.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        name="int8_paged_attention",
        interpret=interpret,
    )(tables, ends, folded, *[codes] * per_tile, *[scales] * per_tile)
    mixed = mixed.reshape(batch, kv_heads, -1, groups, size).transpose(0, 2, 1, 3, 4)
    return mixed.reshape(batch, -1, heads, size)[:, :length]


def _divided(number: Any, size: int) -> Any:
    """Of what is not negative. `//` would ask the default device which TPU it is."""
    return jax.lax.div(jnp.asarray(number, jnp.int32), jnp.int32(size))


def _last(end: Any, length: int, part: Any, block: int) -> Any:
    """The position of the last query of a block."""
    return end - length + (part + 1) * block - 1


def _kernel(
    tables: Any,
    ends: Any,
    query: Any,
    *refs: Any,
    per_tile: int,
    length: int,
    block: int,
    groups: int,
    sm_scale: float,
    sliding_window: int | None,
) -> None:
    from jax.experimental import pallas as pl

    del tables  # the block specs have read it
    codes, scales = refs[:per_tile], refs[per_tile : 2 * per_tile]
    out, largest, total, mixed = refs[2 * per_tile :]
    row, part, tile = (pl.program_id(axis) for axis in range(3))
    _, kv_heads, rows, _ = query.shape
    page_size = codes[0].shape[2]
    size = per_tile * page_size
    begin, last = tile * size, _last(ends[row], length, part, block)
    dtype = query.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = functools.partial(
        jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )

    @pl.when(tile == 0)
    def begin_with_nothing() -> None:
        largest[...] = jnp.full_like(largest, MASKED)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    is_seen = begin <= last
    if sliding_window is not None:
        is_seen &= begin + size > last - block + 1 - sliding_window + 1

    @pl.when(is_seen)
    def add_tile() -> None:
        shape = (rows, size)
        tokens = _divided(jax.lax.broadcasted_iota(jnp.int32, shape, 0), groups)
        position = last - block + 1 + tokens
        place = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = place <= position
        if sliding_window is not None:
            seen &= place > position - sliding_window

        def held(head: int) -> tuple[jax.Array, jax.Array]:
            part = jnp.concatenate([page[0, head] for page in codes], axis=0)
            scale = jnp.concatenate([page[0, head : head + 1] for page in scales], axis=1)
            return part.astype(jnp.float32).astype(dtype), scale

        for head in range(kv_heads):
            keys, key_scale = held(2 * head)
            scores = product(query[0, head], keys, (((1,), (1,)), ((), ())))
            scores = jnp.where(seen, scores * (key_scale * sm_scale), MASKED)
            before = largest[head][:, :1]
            larger = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(scores - larger), 0.0)
            kept = jnp.exp(before - larger)
            values, value_scale = held(2 * head + 1)
            # What nobody has written yet may be anything; zero times that need not be zero.
            scaled = jnp.where(seen, weights * value_scale, 0.0).astype(dtype)
            added = product(scaled, values, (((1,), (0,)), ((), ())))
            sums = total[head][:, :1] * kept + weights.sum(axis=1, keepdims=True)
            mixed[head] = mixed[head] * kept + added
            total[head] = jnp.broadcast_to(sums, total.shape[1:])
            largest[head] = jnp.broadcast_to(larger, largest.shape[1:])

    @pl.when(tile == pl.num_programs(2) - 1)
    def write() -> None:
        for head in range(kv_heads):
            out[0, head] = (mixed[head] / total[head][:, :1]).astype(out.dtype)
