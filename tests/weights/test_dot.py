"""Products of matrices that are made for few rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.weights import decoding
from llama_jax.weights.dot import dot
from llama_jax.weights.tensors import DecodingTensor, narrowed
from tests.tiny import quantize_array


@pytest.mark.parametrize("most", [24, 48])
@pytest.mark.parametrize(
    ("size", "atol"),
    [((96, 64), 2e-4), ((64, 200), 2e-4), ((48, 1536), 2e-4), ((32, 8192), 1e-3)],
)
def test_rows_of_a_decoding_matrix_have_the_same_bits_beside_any_others(size, atol, most):
    matrix = jax.random.normal(jax.random.key(0), size)
    rows, product = _have_the_same_bits_beside_any_others(matrix, most)
    np.testing.assert_allclose(product, rows @ matrix.T, atol=atol)


@pytest.mark.parametrize("most", [24, 48])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4", "int8-dynamic", "int4-dynamic"])
def test_rows_of_a_quantized_decoding_matrix_do_too(scheme, most):
    matrix = jax.random.normal(jax.random.key(0), (1200, 256))
    quantized = quantize_array(matrix, scheme=scheme)
    rows, product = _have_the_same_bits_beside_any_others(quantized, most)
    np.testing.assert_allclose(product, dot(rows, quantized, compute=Compute()), atol=2e-4)


def _have_the_same_bits_beside_any_others(matrix, most):
    rows = jax.random.normal(jax.random.key(1), (most, matrix.shape[1]))
    product = jax.jit(partial(dot, compute=Compute()))
    weight = DecodingTensor(matrix, alike_rows=most)
    wanted = np.asarray(product(rows, weight))
    for count in (2, 3, 7, 8, 9, 16, 17, 24, 25, 32, 33, 40, 41):
        if count <= most:
            np.testing.assert_array_equal(product(rows[:count], weight), wanted[:count], str(count))
    return rows, wanted


@pytest.mark.parametrize(
    ("alike", "most", "shape"),
    [
        ((2, 8, 33, 48), 32, (96, 33)),  # the weight first, filled up to what sums like two rows
        ((2, 8, 32), 32, (96, 32)),
        ((2, 8, 24), 32, (25, 96)),  # steps of 32 rows would sum otherwise: the weight last
    ],
)
def test_rows_are_filled_up_to_a_number_that_sums_like_two(alike, most, shape, monkeypatch):
    monkeypatch.setattr(decoding, "_summing_like_two", lambda *_: alike)
    rows, weight = jnp.zeros((25, 64)), DecodingTensor(jnp.zeros((96, 64)), alike_rows=most)
    traced = jax.make_jaxpr(partial(dot, compute=Compute()))(rows, weight)
    products = [each for each in traced.eqns if each.primitive.name == "dot_general"]
    assert [each.outvars[0].aval.shape for each in products] == [shape]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_narrowed_array_is_the_converted_one_bit_for_bit(dtype):
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    special = [0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x80000001, 0x7F7FFFFF, 0x3F808000]
    array = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32)
    wanted = jnp.asarray(array).astype(dtype)
    found = jax.jit(narrowed, static_argnums=1)(array, dtype)
    assert found.dtype == wanted.dtype == dtype
    np.testing.assert_array_equal(np.isnan(found), np.isnan(array))
    kept = ~np.isnan(array)
    unsigned = f"u{wanted.dtype.itemsize}"
    np.testing.assert_array_equal(
        np.asarray(found)[kept].view(unsigned), np.asarray(wanted)[kept].view(unsigned)
    )


def test_the_gradient_of_a_narrowed_array_comes_through_in_its_own_dtype():
    array, factor = jnp.float32([1.1, -2.3]), jnp.bfloat16([3.0, 0.5])
    gradient = jax.grad(lambda a: (narrowed(a, "bfloat16") * factor).astype(jnp.float32).sum())
    assert gradient(array).dtype == jnp.float32
    np.testing.assert_array_equal(gradient(array), [3.0, 0.5])
