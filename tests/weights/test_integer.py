"""Products of integers: scales at run time or from calibration, exact sums, gradients that pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.formats.checkpoint import load_model, save_model
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.model.transformer import forward
from llama_jax.weights.calibrate import calibrate
from llama_jax.weights.dot import dot
from llama_jax.weights.quantize import (
    INTEGER_SCHEMES,
    ROUNDING_SCHEMES,
    Quantization,
    quantize,
)
from llama_jax.weights.quantized import IntegerTensor, is_quantized
from llama_jax.weights.tensors import to_array
from tests.tiny import FAMILIES, quantize_array, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
TOKENS = tiny_tokens(4, 16)


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def quantized(scheme, config=CONFIG, params=PARAMS, **options):
    peaks = None
    if scheme.endswith("static"):
        peaks = calibrate(config, params, TOKENS, compute=Compute())
    return quantize(config, params, scheme=scheme, peaks=peaks, **options)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-dynamic"])
def test_a_product_by_hand(scheme):
    """Rows of activations have their own scales, sums are exact, a row of zeros stays zero."""
    weight, x = gaussian(5, 33), gaussian(3, 33, seed=1).at[1].set(0)
    leaf = quantize_array(weight, scheme=scheme)
    assert isinstance(leaf, IntegerTensor) and leaf.shape == (5, 33)
    largest = 127 if scheme.startswith("int8") else 7
    scale = np.abs(np.asarray(weight)).max(axis=1) / largest
    codes = np.round(np.asarray(weight) / scale[:, None]).astype(int)
    wide = np.asarray(x, np.float64)
    peak = np.abs(wide).max(axis=1, keepdims=True)
    units = np.where(peak > 0, peak / 127, 1)
    expected = (np.round(wide / units).astype(int) @ codes.T) * units * scale
    np.testing.assert_allclose(dot(x, leaf, compute=Compute()), expected, atol=1e-4)
    assert (np.asarray(dot(x, leaf, compute=Compute()))[1] == 0).all()
    np.testing.assert_array_equal(leaf.codes(), codes)


@pytest.mark.parametrize(("scheme", "size"), [("int8-dynamic", 32), ("int4-dynamic", 33)])
def test_a_product_in_tiles_by_hand(scheme, size):
    """Both operands have scales for 8 inputs at a time; the last tile of four bits may be short."""
    weight, x = gaussian(5, size), gaussian(3, size, seed=1).at[1].set(0).at[2, 3].mul(1000)
    leaf = quantize_array(weight, scheme=scheme, tile=8)
    assert leaf.tile == 8 and leaf.base.scale.shape == (5, -(-size // 8))
    largest = 127 if scheme.startswith("int8") else 7
    expected = np.zeros((3, 5))
    for low in range(0, size, 8):
        part, inputs = (np.asarray(a, np.float64)[:, low : low + 8] for a in (weight, x))
        scale = np.abs(part).max(axis=1) / largest
        peak = np.abs(inputs).max(axis=1, keepdims=True)
        units = np.where(peak > 0, peak / 127, 1)
        codes = np.round(part / scale[:, None])
        expected += (np.round(inputs / units) @ codes.T) * units * scale
    got = dot(x, leaf, compute=Compute())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    # What is far out in one tile leaves the others alone.
    whole = dot(x, quantize_array(weight, scheme=scheme), compute=Compute())
    exact = np.asarray(x @ weight.T)
    far, near = (np.abs(np.asarray(y) - exact)[2].max() for y in (whole, got))
    assert near < 0.7 * far or scheme.startswith("int4")
    gradient = jax.grad(lambda x: dot(x, leaf, compute=Compute()).sum())(x)
    np.testing.assert_allclose(gradient, jnp.ones((3, 5)) @ to_array(leaf), atol=1e-5)


def test_static_scales_are_fixed_and_clamp():
    weight = gaussian(5, 32)
    how = Quantization("int8-static", peaks={"the weight": jnp.float32(2.0)})
    leaf = how.apply("the weight", weight)
    x = jnp.full((1, 32), 2.0)
    once, beyond = (dot(value, leaf, compute=Compute()) for value in (x, 100 * x))
    np.testing.assert_array_equal(once, beyond)
    np.testing.assert_allclose(once, x @ to_array(leaf).T, atol=1e-4)
    half = dot(x / 2, leaf, compute=Compute())  # 63.5 -> 64
    np.testing.assert_allclose(half, once * 64 / 127, rtol=1e-5)


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_every_intended_product_is_one_of_integers(scheme):
    params = quantized(scheme)
    run = jax.jit(lambda params, tokens: forward(CONFIG, params, tokens))
    text = run.lower(params, TOKENS).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    integer = [line for line in products if "xi8>" in line.split(":")[-1] and "xi32>" in line]
    # Seven linear layers of the scanned layer; the scores, their mix and the head stay.
    assert (len(integer), len(products)) == (7, 10)


@pytest.mark.parametrize("scheme", ROUNDING_SCHEMES)
def test_logits_stay_near_and_survive_the_disk_and_the_mesh(tmp_path, scheme):
    params = quantized(scheme)
    run = jax.jit(lambda params: forward(CONFIG, params, TOKENS))
    exact, got = run(PARAMS), run(params)
    error = float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))
    bounds = {"int8": (0.001, 0.05), "int4": (0.02, 0.5), "fp8": (0.01, 0.1)}
    low, high = bounds[scheme.partition("-")[0]]
    assert low < error < high
    save_model(tmp_path / "model", CONFIG, params, None)
    _, again = load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    spread = jax.device_put(params, shardings(CONFIG, params, mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(spread), got, atol=2e-2)


def test_calibration_sees_the_largest_input_of_each_layer():
    peaks = calibrate(CONFIG, PARAMS, [TOKENS[3, :5], *TOKENS], compute=Compute())
    whole = calibrate(CONFIG, PARAMS, TOKENS, compute=Compute())
    matrices = [
        p for p, leaf in tree.flatten(quantized("int8-dynamic")).items() if is_quantized(leaf)
    ]
    assert set(matrices) <= set(peaks) and "lm_head.weight" in peaks
    assert "norm.weight" not in peaks and peaks["lm_head.weight"].shape == ()
    for path in matrices:
        assert peaks[path].shape == (2,)
        np.testing.assert_allclose(peaks[path], whole[path], rtol=1e-5)
    # The first layer's input is the normed embedding.
    rows = PARAMS["embed_tokens"]["weight"][TOKENS]
    normed = rows / jnp.sqrt(jnp.mean(rows**2, -1, keepdims=True) + CONFIG.rms_norm_eps)
    first = jnp.abs(normed * PARAMS["layers"]["input_layernorm"]["weight"][0]).max()
    np.testing.assert_allclose(peaks["layers.self_attn.q_proj.weight"][0], first, rtol=1e-5)


def test_gradients_pass_straight_through():
    leaf = quantize_array(gaussian(5, 32), scheme="int8-dynamic")
    x, weights = gaussian(3, 32, seed=1), gaussian(3, 5, seed=2)
    got = jax.grad(lambda x: (dot(x, leaf, compute=Compute()) * weights).sum())(x)
    np.testing.assert_allclose(got, weights @ to_array(leaf), atol=1e-5)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="without the ranges of activations"):
        quantize(CONFIG, PARAMS, scheme="int8-static")
    with pytest.raises(ValueError, match="with the ranges of activations"):
        quantize(CONFIG, PARAMS, scheme="int8-dynamic", peaks={})
    with pytest.raises(ValueError, match=r"says nothing about layers\.mlp\.down_proj\.weight"):
        quantize(CONFIG, PARAMS, scheme="int8-static", peaks={})
    with pytest.raises(ValueError, match="one scale for all inputs of a weight; leave tile out"):
        quantize(CONFIG, PARAMS, scheme="int8-static", tile=32, peaks={})
    with pytest.raises(ValueError, match="few scales"):
        quantize(CONFIG, PARAMS, scheme="int4-dynamic", double=True)
    mixtral = FAMILIES["mixtral"]
    with pytest.raises(ValueError, match="experts are multiplied in groups"):
        quantize(mixtral, tiny_params(mixtral), scheme="int8-dynamic")
    with pytest.raises(ValueError, match="nothing to calibrate with"):
        calibrate(CONFIG, PARAMS, [], compute=Compute())
