"""Rounding with an eye on inputs: GPTQ, SmoothQuant and AWQ against hand, Qwix, and rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix._src.core.qarray import HowToQuantize
from qwix.contrib import awq_core, gptq_core

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.model.transformer import forward
from llama_jax.weights import smooth as smoothing
from llama_jax.weights.calibrate import calibrate
from llama_jax.weights.gptq import choose_codes, gptq
from llama_jax.weights.quantize import SCHEMES, Quantization, quantize
from llama_jax.weights.quantized import IntegerTensor, is_quantized
from llama_jax.weights.smooth import smooth
from llama_jax.weights.tensors import to_array
from tests.tiny import FAMILIES, quantize_array, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

ROWS = list(tiny_tokens(6, 24))
OPTIONS = {"tile": None, "skip": None, "double": False, "compute": Compute()}


def correlated(tokens, size, seed=0):
    """Inputs whose channels go together and differ in size, most active first."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(size, size)) * np.linspace(3.0, 0.2, size)
    x = (rng.normal(size=(tokens, size)) @ mix).astype(np.float32)
    return x[:, np.argsort(-(x**2).sum(axis=0))]


def gaussian(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def output_error(weight, leaf, x):
    return float(jnp.linalg.norm(x @ (to_array(leaf) - weight).T) / jnp.linalg.norm(x @ weight.T))


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_is_that_of_qwix(bits):
    """The same codes, but for a few that lie in the middle between two."""
    x, columns = correlated(100, 20), 20
    moments = jnp.asarray(x.T @ x)
    # One largest value for all rows, so that Qwix, which maps it to 127.5 or 7.5, can be told.
    weight = gaussian(12, columns).at[:, 0].set(3.0)
    fixed = HowToQuantize(
        qtype=f"int{bits}", calibration_method="fixed,-3.0,3.0", channelwise_axes=(0,)
    )
    theirs, _ = gptq_core.quantize_weight(weight, moments, fixed)
    leaf = quantize_array(weight, scheme=f"int{bits}-dynamic")
    scale = jnp.broadcast_to(theirs.scale.reshape(-1, 1)[:1], (12, 1))
    leaf = dataclasses.replace(leaf, base=dataclasses.replace(leaf.base, scale=scale))
    ours = choose_codes(weight, moments, leaf, SCHEMES[f"int{bits}"])
    assert isinstance(ours, IntegerTensor)
    largest = 127 if bits == 8 else 7
    expected = np.clip(np.asarray(theirs.qvalue, np.int32), -largest, largest)
    assert np.mean(expected != np.asarray(ours.codes(), np.int32)) < 0.02
    nearest = np.asarray(leaf.codes(), np.int32)
    assert np.mean(expected != nearest) > 0.2


@pytest.mark.parametrize("scheme", [*SCHEMES, "int4-dynamic"])
def test_gptq_has_less_error_of_outputs_than_rounding(scheme):
    weight, x = gaussian(40, 150), correlated(400, 150)
    leaf = quantize_array(weight, scheme=scheme)
    finer = choose_codes(weight, jnp.asarray(x.T @ x), leaf, SCHEMES[scheme.partition("-")[0]])
    assert jax.tree.map(jnp.shape, finer) == jax.tree.map(jnp.shape, leaf)
    assert output_error(weight, finer, x) < 0.8 * output_error(weight, leaf, x)
    # With inputs that have nothing to do with each other there is nothing to make good.
    alone = choose_codes(weight, jnp.eye(150), leaf, SCHEMES[scheme.partition("-")[0]])
    jax.tree.map(np.testing.assert_array_equal, alone, leaf)


def test_gptq_of_a_model_with_experts():
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    how = Quantization("int4")
    rounded = quantize(config, params, scheme="int4")
    finer = gptq(config, params, rounded, ROWS, how=how, compute=Compute())
    assert jax.tree.structure(finer) == jax.tree.structure(rounded)
    for path, leaf in tree.flatten(rounded).items():
        same = jax.tree.map(np.array_equal, leaf, tree.flatten(finer)[path])
        assert jax.tree.all(same) != is_quantized(leaf), path
    tokens = jnp.asarray(np.stack(ROWS))
    exact = forward(config, params, tokens)
    errors = [float(jnp.linalg.norm(forward(config, p, tokens) - exact)) for p in (finer, rounded)]
    assert errors[0] < errors[1]


def outlying(config):
    """A model in whose streams a few channels are far larger than the others."""
    leaves = tree.flatten(tiny_params(config))

    def times(path, where, factor):
        leaves[f"layers.{path}"] = leaves[f"layers.{path}"].at[where].mul(factor)

    times("input_layernorm.weight", (..., 5), 100.0)
    for name in "qkv":
        times(f"self_attn.{name}_proj.weight", (..., 5), 0.01)
    if config.moe is None:
        times("post_attention_layernorm.weight", (..., 5), 100.0)
        for name in ("gate", "up"):
            times(f"mlp.{name}_proj.weight", (..., 5), 0.01)
        times("mlp.up_proj.weight", (slice(None), 3), 50.0)
        times("mlp.down_proj.weight", (..., 3), 0.02)
    return tree.unflatten(leaves)


@pytest.mark.parametrize("family", ["llama-biases", "llama-tied", "mixtral"])
@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic"])
def test_smoothing_changes_no_logit(family, scheme):
    config = FAMILIES[family]
    params = outlying(config)
    skip = None
    if family == "mixtral":
        skip = ["experts", "role:embedding", "role:head", "role:router"]
    smoothed = smooth(config, params, ROWS, scheme=scheme, **{**OPTIONS, "skip": skip})
    changed = {
        path
        for path, leaf in tree.flatten(params).items()
        if not np.array_equal(leaf, tree.flatten(smoothed)[path])
    }
    assert {"layers.self_attn.q_proj.weight", "layers.input_layernorm.weight"} <= changed
    assert ("layers.mlp.down_proj.weight" in changed) == (family != "mixtral")
    assert not any("experts" in path or "embed" in path for path in changed)
    tokens = jnp.asarray(ROWS[0])[None]
    run = jax.jit(lambda params: forward(config, params, tokens))
    np.testing.assert_array_equal(run(smoothed), run(params))


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_smoothing_takes_outliers_away(scheme):
    config = FAMILIES["llama-gqa"]
    params = outlying(config)
    tokens = jnp.asarray(np.stack(ROWS))
    exact = forward(config, params, tokens)

    def error(params):
        peaks = None
        if scheme.endswith("static"):
            peaks = calibrate(config, params, ROWS, compute=Compute())
        rounded = quantize(config, params, scheme=scheme, peaks=peaks)
        return float(jnp.linalg.norm(forward(config, rounded, tokens) - exact))

    smoothed = smooth(config, params, ROWS, scheme=scheme, **OPTIONS)
    assert error(smoothed) < 0.3 * error(params)


def test_awq_has_the_exponents_of_qwix():
    """The same scales for each exponent, before they become powers of two."""
    mean = np.abs(correlated(50, 64)).mean(axis=0)
    found = np.asarray(smoothing._awq(jnp.asarray(mean)))
    how = HowToQuantize(qtype="int4", channelwise_axes=(0,))
    theirs = awq_core.search_optimal_scales(gaussian(32, 64), jnp.asarray(mean), how)
    assert np.isclose(found, theirs, rtol=1e-5).all(axis=1).any()


def test_awq_has_less_error_of_outputs_than_rounding():
    config = FAMILIES["llama-gqa"]
    params = outlying(config)
    tokens = jnp.asarray(np.stack(ROWS))
    exact = forward(config, params, tokens)
    smoothed = smooth(config, params, ROWS, scheme="int4", **OPTIONS)
    errors = [
        float(jnp.linalg.norm(forward(config, quantize(config, p, scheme="int4"), tokens) - exact))
        for p in (smoothed, params)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_what_cannot_be_measured_is_refused():
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    with pytest.raises(ValueError, match="nothing to calibrate with"):
        smooth(config, params, [], scheme="int4", **OPTIONS)
    rounded = quantize(config, params, scheme="int4")
    with pytest.raises(ValueError, match="nothing to calibrate with"):
        gptq(config, params, rounded, [], how=Quantization("int4"), compute=Compute())
    with pytest.raises(ValueError, match="quantized"):
        smooth(config, rounded, ROWS, scheme="int4", **OPTIONS)
