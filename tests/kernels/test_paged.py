"""Attention over pages: the reference against attention over whole rows, the kernel against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

from llama_jax.config import DEFAULT_RULES
from llama_jax.kernels import paged
from llama_jax.mesh.sharding import make_mesh
from llama_jax.mesh.slices import slice_devices
from llama_jax.model.attention import attend, causal_mask

pytestmark = pytest.mark.compiled_quickly

PAGE, COUNT = 8, 24


def case(begins, length, *, heads=4, kv_heads=2, size=16, kernel=False, seed=0):
    """Rows that hold begins[b] positions in scattered pages and now get `length` more: the
    operands of `paged.attend`, and all keys and values as [B, S, K, H]."""
    rng = np.random.default_rng(seed)
    width, wide = paged.page_shape(kv_heads, size, jnp.dtype("float32"), parts=1, kernel=kernel)
    most = max(begins) + length
    keys, values = rng.normal(size=(2, len(begins), most, kv_heads, size)).astype(np.float32)
    query = rng.normal(size=(len(begins), length, heads, size)).astype(np.float32)
    tables = np.full((len(begins), -(-most // PAGE)), paged.NOWHERE, np.int32)
    pages = np.full((2 * COUNT, PAGE, width, wide), np.nan, np.float32)
    pages[[0, COUNT]] = 0
    free = iter(rng.permutation(np.arange(1, COUNT)))
    for row, begin in enumerate(begins):
        for place in range(begin + length):
            if place % PAGE == 0:
                tables[row, place // PAGE] = next(free)
            if place < begin:
                held = pages[COUNT + tables[row, place // PAGE], place % PAGE]
                held[:] = 0
                held[: 2 * kv_heads : 2, :size] = keys[row, place]
                held[1 : 2 * kv_heads : 2, :size] = values[row, place]
    positions = np.asarray(begins, np.int32)[:, None] + np.arange(length, dtype=np.int32)
    new = [np.stack([x[b, p] for b, p in enumerate(positions)]) for x in (keys, values)]
    # The second layer of two.
    operands = (query, *new, pages, tables, positions, np.int32(COUNT))
    return [jnp.asarray(each) for each in operands], keys, values


def wanted(operands, keys, values, window):
    query, positions = operands[0], np.asarray(operands[5])
    places = np.arange(keys.shape[1])[None].repeat(len(keys), 0)
    mask = causal_mask(jnp.asarray(positions), jnp.asarray(places), sliding_window=window)
    keys, values = jnp.asarray(keys).transpose(0, 2, 3, 1), jnp.asarray(values).swapaxes(1, 2)
    return attend(query, keys, values, mask, is_divided=True)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("begins, length", [((0,), 20), ((30, 3, 17), 1), ((5, 16), 3)])
def test_rows_see_their_pages_and_nothing_else(begins, length, window):
    operands, keys, values = case(begins, length)
    mixed, pages = paged.attend(*operands, sliding_window=window, rules=DEFAULT_RULES, kernel=False)
    np.testing.assert_allclose(mixed, wanted(operands, keys, values, window), atol=1e-5)
    before = np.asarray(operands[3])
    np.testing.assert_array_equal(pages[:COUNT], before[:COUNT])  # the other layer
    written = (~np.isnan(np.asarray(pages)) & np.isnan(before)).any(axis=(2, 3)).sum()
    assert written == len(begins) * length


def test_what_has_no_page_is_dropped():
    operands, _, _ = case((0, 0), 4)
    operands[4] = operands[4].at[1].set(paged.NOWHERE)
    mixed, pages = paged.attend(*operands, sliding_window=None, rules=DEFAULT_RULES, kernel=False)
    assert np.isfinite(mixed).all()
    assert not np.asarray(pages)[[0, COUNT]].any()


@pytest.mark.parametrize(
    "begins, length, heads, kv_heads, size, window",
    [((0,), 20, 4, 2, 64, None), ((30, 3, 17), 1, 9, 3, 64, 9), ((5, 16), 3, 8, 1, 128, None)],
)
def test_the_kernel_is_asked_for_what_the_reference_computes(
    monkeypatch, begins, length, heads, kv_heads, size, window
):
    """Pallas cannot interpret this kernel (it reshapes a buffer), so what its authors say it
    computes stands in for it: packed heads, filled up, and rows as they are handed over."""
    options = {}

    def by_its_authors(*operands, **more):
        for name in ("num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes"):
            options[name] = more.pop(name)
        return ragged.ref_ragged_paged_attention(*operands, **more)

    monkeypatch.setattr(ragged, "ragged_paged_attention", by_its_authors)
    shape = {"heads": heads, "kv_heads": kv_heads, "size": size, "kernel": True}
    operands, keys, values = case(begins, length, **shape)
    mixed, pages = paged.attend(*operands, sliding_window=window, rules=DEFAULT_RULES, kernel=True)
    assert all(options.values())  # else the kernel asks the default device for them
    np.testing.assert_allclose(mixed, wanted(operands, keys, values, window), atol=2e-5)
    reference = paged.attend(*operands, sliding_window=window, rules=DEFAULT_RULES, kernel=False)
    np.testing.assert_array_equal(pages, reference[1])


@pytest.mark.parametrize(
    "kv_heads, size, dtype, parts, shape",
    [
        (8, 128, "bfloat16", 1, (16, 128)),
        (8, 128, "bfloat16", 8, (16, 128)),
        (8, 64, "bfloat16", 1, (16, 128)),
        (3, 64, "bfloat16", 1, (8, 128)),
        (3, 64, "float32", 1, (8, 128)),
        (10, 128, "bfloat16", 1, (32, 128)),
        (10, 128, "bfloat16", 2, (32, 128)),
    ],
)
def test_pages_fill_registers(kv_heads, size, dtype, parts, shape):
    found = paged.page_shape(kv_heads, size, jnp.dtype(dtype), parts=parts, kernel=True)
    assert found == shape
    assert paged.page_shape(kv_heads, size, jnp.dtype(dtype), parts=parts, kernel=False) == (
        2 * kv_heads,
        size,
    )


@pytest.mark.parametrize(
    "name, batch, length, heads, kv_heads, size",
    [("v5e-1", 1, 128, 9, 3, 64), ("v6e-1", 16, 1, 32, 8, 128), ("v5e-1", 4, 1, 8, 1, 128)],
)
def test_compiles_for_a_tpu_in_place(name, batch, length, heads, kv_heads, size):
    pytest.importorskip("libtpu", reason="the TPU compiler is on Linux x86-64 only")
    mesh = make_mesh({"tensor": 1}, devices=slice_devices(name))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    dtype = jnp.dtype("bfloat16")
    width, wide = paged.page_shape(kv_heads, size, dtype, parts=1, kernel=True)
    shapes = [(batch, length, n, size) for n in (heads, kv_heads, kv_heads)]
    shapes.append((256, 32, width, wide))
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    structs += [
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
        for shape in ((batch, 64), (batch, length), ())
    ]

    def step(*operands):
        return paged.attend(*operands, sliding_window=None, rules=DEFAULT_RULES, kernel=True)

    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=3).lower(*structs).compile()
    assert "tpu_custom_call" in compiled.as_text()
    stats = compiled.memory_analysis()
    page_bytes = 256 * 32 * width * wide * 2
    assert stats.alias_size_in_bytes == page_bytes
    assert stats.temp_size_in_bytes < page_bytes


def test_tables_must_fit_into_scalar_memory():
    paged.check_tables(64, 1028)
    with pytest.raises(ValueError, match=r"256 rows of 1028 pages .* make pages larger"):
        paged.check_tables(256, 1028)
