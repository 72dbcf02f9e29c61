"""Pages of int8: what is written; the kernel, interpreted against float64 and compiled for TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import DEFAULT_RULES
from llama_jax.kernels import paged
from llama_jax.kernels.paged_int8 import int8_paged_attention
from llama_jax.kernels.rounded import Rounded, rounded
from llama_jax.mesh.sharding import make_mesh
from llama_jax.mesh.slices import slice_devices
from tests.tiny import tiny_config

pytestmark = pytest.mark.compiled_quickly

PAGE, COUNT = 32, 100


def case(begins, length, *, heads, kv_heads, size, seed=0):
    """Rows that hold begins[b] positions in scattered pages of the second layer of two, and now get
    `length` more: the operands of `paged.attend`, and all keys and values [B, S, C, H] that its
    queries are to see, as float64. Scales that nobody has written are NaN."""
    rng = np.random.default_rng(seed)
    batch, most = len(begins), max(begins) + length
    config = tiny_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size)
    pages = paged.empty_pages(config, 2 * COUNT, PAGE, "int8", parts=1, kernel=False)
    codes, scales = np.array(pages.codes), np.full_like(pages.scale, np.nan)
    tables = np.full((batch, -(-most // PAGE) + 2), paged.NOWHERE, np.int32)
    free = iter(rng.permutation(np.arange(1, COUNT)))
    pairs = rng.normal(size=(batch, most, 2 * kv_heads, size)).astype(np.float32)
    held = rounded(jnp.asarray(pairs))
    held = np.asarray(held.codes), np.asarray(held.scale)
    for row, begin in enumerate(begins):
        for place in range(begin + length):
            if place % PAGE == 0:
                tables[row, place // PAGE] = next(free)
            if place < begin:
                at = COUNT + tables[row, place // PAGE], slice(None), place % PAGE
                codes[at], scales[at] = held[0][row, place], held[1][row, place, :, 0]
    positions = np.asarray(begins, np.int32)[:, None] + np.arange(length, dtype=np.int32)
    new = np.stack([pairs[row, places] for row, places in enumerate(positions)])
    query = rng.normal(size=(batch, length, heads, size)).astype(np.float32)
    arrays = (
        query,
        new[:, :, ::2],
        new[:, :, 1::2],
        Rounded(codes, scales),
        tables,
        positions,
        np.int32(COUNT),
    )
    return jax.tree.map(jnp.asarray, list(arrays)), held[0].astype(np.float64) * held[1]


def wanted(operands, held, window):
    """Softmax attention, in float64, one query at a time."""
    query, positions = (np.asarray(operands[n]) for n in (0, 5))
    batch, length, heads, size = query.shape
    groups = 2 * heads // held.shape[2]
    mixed = np.zeros(query.shape)
    for row, token, head in np.ndindex(batch, length, heads):
        last = positions[row, token]
        seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
        keys, values = (held[row, seen, 2 * (head // groups) + n] for n in (0, 1))
        scores = keys @ query[row, token, head].astype(np.float64) / size**0.5
        weights = np.exp(scores - scores.max())
        mixed[row, token, head] = weights @ values / weights.sum()
    return mixed


CASES = [
    # begins, length, heads, kv_heads, size, window
    ((600, 2, 36), 1, 4, 2, 16, None),  # two tiles, and a row of one page
    ((0,), 40, 2, 2, 16, None),
    ((1000, 5), 4, 6, 2, 16, 70),  # tiles that a window has passed
    ((1000, 0), 75, 2, 1, 16, 100),  # queries in three blocks, the last not full
]


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("begins, length, heads, kv_heads, size, window", CASES)
def test_rows_see_their_pages_and_nothing_else(
    monkeypatch, begins, length, heads, kv_heads, size, window, kernel
):
    monkeypatch.setattr(
        paged, "int8_paged_attention", partial(int8_paged_attention, interpret=True)
    )
    operands, held = case(begins, length, heads=heads, kv_heads=kv_heads, size=size)
    attend = jax.jit(
        partial(paged.attend, sliding_window=window, rules=DEFAULT_RULES, kernel=kernel)
    )
    mixed, pages = attend(*operands)
    np.testing.assert_allclose(mixed, wanted(operands, held, window), atol=1e-5)
    before = operands[3]
    for new, old in ((pages.codes, before.codes), (pages.scale, before.scale)):
        np.testing.assert_array_equal(new[:COUNT], old[:COUNT])  # the other layer
    written = ~np.isnan(pages.scale) & np.isnan(before.scale)
    assert written.sum() == len(begins) * length * 2 * kv_heads


def test_new_tokens_are_rounded_as_slots_round_them():
    operands, held = case((40, 3), 3, heads=2, kv_heads=1, size=16)
    _, pages = paged.attend(*operands, sliding_window=None, rules=DEFAULT_RULES, kernel=False)
    tables, positions = (np.asarray(operands[n]) for n in (4, 5))
    for (row, _), place in np.ndenumerate(positions):
        at = COUNT + tables[row, place // PAGE], slice(None), place % PAGE
        scales = np.asarray(pages.scale)[at][:, None]
        found = np.asarray(pages.codes)[at].astype(np.float64) * scales
        np.testing.assert_array_equal(found, held[row, place])


def test_what_has_no_page_is_dropped():
    operands, _ = case((0, 0), 4, heads=2, kv_heads=1, size=16)
    operands[4] = operands[4].at[1].set(paged.NOWHERE)
    _, pages = paged.attend(*operands, sliding_window=None, rules=DEFAULT_RULES, kernel=False)
    written = ~np.isnan(np.asarray(pages.scale))
    assert written.sum() == 4 * 2 and not written[[0, COUNT]].any()
    assert not np.asarray(pages.codes)[[0, COUNT]].any()


@pytest.mark.parametrize(
    "name, batch, length, heads, kv_heads, size, page, rows",
    [
        ("v5e-1", 1, 128, 9, 3, 64, 128, 8),
        ("v6e-1", 8, 1, 32, 8, 128, 128, 16),
        ("v5p-8", 2, 4, 8, 1, 128, 256, 2),
    ],
)
def test_compiles_for_a_tpu_in_place(name, batch, length, heads, kv_heads, size, page, rows):
    pytest.importorskip("libtpu", reason="the TPU compiler is on Linux x86-64 only")
    mesh = make_mesh({"tensor": 1}, devices=slice_devices(name)[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    config = tiny_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size)
    empty = partial(paged.empty_pages, config, 4096, page, "int8", parts=1, kernel=True)
    new = [(batch, length, n, size) for n in (heads, kv_heads, kv_heads)]
    floats = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in new]
    integers = [
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 64), (batch, length), ())
    ]
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        [*floats, jax.eval_shape(empty), *integers],
    )
    step = partial(paged.attend, sliding_window=None, rules=DEFAULT_RULES, kernel=True)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=3).lower(*structs).compile()
    assert "int8_paged_attention" in compiled.as_text()
    stats = compiled.memory_analysis()
    pages = 4096 * page * (2 * kv_heads * 128 + rows * 4)
    assert stats.alias_size_in_bytes == pages
    assert stats.temp_size_in_bytes < pages / 50


def test_more_rows_than_32_bits_count_are_refused():
    config = tiny_config()
    heads = 2 * config.num_key_value_heads
    most = 2**31 // heads // 128 - 2
    for parts, num_pages in ((1, most), (2, 2 * most)):
        empty = partial(paged.empty_pages, config, page_size=128, dtype="int8", kernel=False)
        jax.eval_shape(partial(empty, num_pages=num_pages, parts=parts))
        with pytest.raises(ValueError, match="more than are counted in 32 bits"):
            empty(num_pages=num_pages + 4, parts=parts)


def test_a_kernel_wants_pages_of_whole_registers():
    config = tiny_config()
    with pytest.raises(ValueError, match="block_size is 48; .* a multiple of 128"):
        paged.empty_pages(config, 4, 48, "int8", parts=1, kernel=True)
    pages = paged.empty_pages(config, 4, 48, "int8", parts=1, kernel=False)
    assert pages.codes.shape == (4, 2 * config.num_key_value_heads, 48, config.head_dim)
