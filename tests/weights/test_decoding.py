"""Quantized matrices made for decoding: the products of the leaves they hold, in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.model.layout import for_decoding
from llama_jax.model.transformer import forward
from llama_jax.weights import decoding
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.dot import dot
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import ROUNDING_SCHEMES, SCHEMES, Quantization
from llama_jax.weights.tensors import DecodingTensor, to_array
from tests.adapters import trained
from tests.tiny import quantize_array, tiny_config, tiny_tokens
from tests.weights.test_integer import quantized

pytestmark = pytest.mark.compiled_quickly

WAYS = [(scheme, None, False) for scheme in SCHEMES] + [("int4", None, True), ("nf4", None, True)]
WAYS += [("int8", 32, False), ("fp8", 32, False), ("int4", 24, False), ("nf4", 15, False)]
WAYS += [("int8-dynamic", None, False), ("int8-dynamic", 32, False)]
WAYS += [("int4-dynamic", None, False), ("int4-dynamic", 24, False), ("int4-dynamic", 15, False)]


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of seven rows, of which the last takes some again."""
    monkeypatch.setattr(decoding, "_PIECE", 7 * 192)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("scheme", "tile", "double"), WAYS)
def test_products_in_pieces_are_those_of_the_leaf(scheme, tile, double):
    width = 190 if scheme.startswith(("int4", "nf4")) else 192
    how = {"scheme": scheme, "tile": tile}
    leaf = quantize_array(gaussian(40, width), **how, double=double)
    made = DecodingTensor(leaf)
    assert made.shape == (40, width)
    np.testing.assert_array_equal(to_array(made), to_array(leaf))
    product = jax.jit(lambda x, weight: dot(x, weight, compute=Compute()))
    for rows in (1, 9, 60):
        x = gaussian(rows, width, seed=rows)
        wanted = product(x, leaf)
        assert product(x, made).dtype == wanted.dtype == jnp.float32
        if scheme.endswith("dynamic") and tile is None:
            np.testing.assert_array_equal(product(x, made), wanted)
        else:
            np.testing.assert_allclose(product(x, made), wanted, atol=1e-4)
    narrow = product(gaussian(2, width).astype(jnp.bfloat16), made)
    assert narrow.dtype == jnp.bfloat16


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4"])
def test_the_whole_matrix_is_never_in_memory(scheme):
    leaf = quantize_array(gaussian(400, 192), scheme=scheme)
    product = jax.jit(lambda x, weight: dot(x, weight, compute=Compute()))
    x, whole = gaussian(4, 192), 400 * 192 * 4
    of_leaf, of_pieces = (
        product.lower(x, weight).compile().memory_analysis().temp_size_in_bytes
        for weight in (leaf, DecodingTensor(leaf))
    )
    # Less than the bytes of fp8, which must not be copied either.
    assert of_pieces < whole / 4 < whole <= of_leaf


def test_static_scales_stay():
    how = Quantization("int4-static", peaks={"the weight": jnp.float32(2.0)})
    leaf = how.apply("the weight", gaussian(5, 32))
    for rows in (1, 3):
        x = gaussian(rows, 32, seed=1)
        np.testing.assert_array_equal(
            dot(x, DecodingTensor(leaf), compute=Compute()), dot(x, leaf, compute=Compute())
        )


@pytest.mark.parametrize("scheme", [*SCHEMES, *ROUNDING_SCHEMES])
def test_a_quantized_model_made_for_decoding_is_the_same_model(scheme):
    config, tokens = tiny_config(), tiny_tokens(2, 12)
    params = quantized(scheme)
    made = for_decoding(params)
    assert isinstance(made["layers"][0]["self_attn"]["q_proj"]["weight"], DecodingTensor)
    np.testing.assert_allclose(
        forward(config, made, tokens), forward(config, params, tokens), atol=2e-5
    )


def test_what_lies_under_adapters_is_made_too():
    config, tokens = tiny_config(), tiny_tokens(2, 12)
    params = trained(config, add_lora(config, quantized("nf4"), LoraConfig(r=4), jax.random.key(0)))
    made = for_decoding(params)
    leaf = made["layers"][0]["self_attn"]["q_proj"]["weight"]
    assert isinstance(leaf, LoraTensor) and isinstance(leaf.base, DecodingTensor)
    np.testing.assert_allclose(
        forward(config, made, tokens), forward(config, params, tokens), atol=2e-5
    )


def test_bytes_are_those_of_the_quantized_model():
    params = quantized("int4")
    assert tree.num_bytes(for_decoding(params)) == tree.num_bytes(params)
