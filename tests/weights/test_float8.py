"""Matrices whose inputs are rounded to float8: against numpy's own float8, and by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.model.transformer import forward
from llama_jax.weights.dot import dot
from llama_jax.weights.float8 import LARGEST, as_float8, to_nearest
from llama_jax.weights.quantize import Quantization, quantize
from llama_jax.weights.quantized import Float8Tensor
from llama_jax.weights.tensors import to_array
from tests.tiny import FAMILIES, tiny_params, tiny_tokens

CONFIG = FAMILIES["llama-biases"]
PARAMS = tiny_params(CONFIG)
TOKENS = tiny_tokens(4, 12)
FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
FLOAT8 = np.sort(FLOAT8[np.isfinite(FLOAT8)])


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_numbers_are_rounded_as_numpy_rounds_them():
    middles = (FLOAT8[:-1] + FLOAT8[1:]) / 2
    around = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    random = np.random.default_rng(0).uniform(-448, 448, 10_000).astype(np.float32)
    x = np.concatenate([FLOAT8, middles, *around, random, random * 1e-3, random * 1e-5])
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(to_nearest)(x), expected)


def test_each_row_has_a_scale_of_its_own():
    x = np.array(gaussian(3, 33) * jnp.array([[1.0], [1e-4], [300.0]]))
    x[1, 4] = 0
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
    expected = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(as_float8(x), expected)
    assert (np.asarray(as_float8(np.zeros((2, 5), np.float32))) == 0).all()


def test_with_a_fixed_scale_what_lies_beyond_becomes_the_largest():
    x = jnp.array([[0.5, -1.0, 3.0, -1000.0]])
    np.testing.assert_array_equal(as_float8(x, jnp.float32(1 / 448)), [[0.5, -1.0, 1.0, -1.0]])


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-static"])
def test_a_product_is_that_of_rounded_inputs_and_what_codes_stand_for(scheme):
    weight, x = gaussian(5, 33), gaussian(3, 33, seed=1)
    peaks = {"the weight": jnp.float32(2.0)} if scheme.endswith("static") else None
    leaf = Quantization(scheme, peaks=peaks).apply("the weight", weight)
    assert isinstance(leaf, Float8Tensor) and leaf.shape == (5, 33)
    scale = None if peaks is None else jnp.float32(2.0 / LARGEST)
    matrix = np.asarray(to_array(leaf), np.float64)
    expected = np.asarray(as_float8(x, scale), np.float64) @ matrix.T
    np.testing.assert_allclose(dot(x, leaf, compute=Compute()), expected, atol=1e-5)
    assert not np.allclose(np.asarray(x, np.float64) @ matrix.T, expected, atol=1e-3)


def test_gradients_pass_straight_through():
    leaf = Quantization("fp8-dynamic").apply("the weight", gaussian(5, 33))
    x, outer = gaussian(3, 33, seed=1), gaussian(3, 5, seed=2)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)):

        def total(x):
            return jnp.sum(dot(x, leaf, compute=Compute()).astype(jnp.float32) * outer)

        gradient = jax.grad(total)(x.astype(dtype))
        assert gradient.dtype == dtype
        np.testing.assert_allclose(
            gradient.astype(jnp.float32), outer @ to_array(leaf), atol=tolerance
        )


def test_rounded_inputs_lose_more_than_rounded_weights_alone():
    run = jax.jit(lambda params: forward(CONFIG, params, TOKENS))
    exact = run(PARAMS)
    weights, both = (
        jnp.linalg.norm(run(quantize(CONFIG, PARAMS, scheme=scheme)) - exact)
        for scheme in ("fp8", "fp8-dynamic")
    )
    assert weights < both < 2 * weights
