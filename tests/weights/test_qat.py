"""Quantization-aware training: AQT's product against plain arithmetic, and conversion after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.formats.checkpoint import load_model, save_model
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.model.transformer import forward
from llama_jax.weights.dot import dot
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.qat import codes
from llama_jax.weights.qat_tree import add_qat, convert_qat, has_qat
from llama_jax.weights.quantized import IntegerTensor, PackedTensor
from llama_jax.weights.select import trainable_mask
from llama_jax.weights.tensors import QatTensor, to_array
from tests.adapters import trained
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
TOKENS = tiny_tokens(4, 16)


def wrapped(bits=8, backward="straight_through", skip=None):
    return add_qat(CONFIG, PARAMS, bits=bits, backward=backward, skip=skip)


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_product_is_that_of_rounded_operands(bits):
    """R71, R72, R74: per output channel, half to even, zeros stay zeros."""
    weight = (
        gaussian(5, 64)
        .at[2]
        .set(0)
        .at[3]
        .set(jnp.linspace(-1, 1, 64))
        .at[4, :3]
        .set(jnp.array([-8.0, 4.1, 8.0]))
    )
    largest = 127 if bits == 8 else 7
    got, scale = codes(weight, bits=bits)
    peak = np.abs(np.asarray(weight)).max(axis=1, keepdims=True)
    np.testing.assert_allclose(
        np.asarray(scale)[[0, 1, 3, 4]], peak[[0, 1, 3, 4]] / largest, rtol=1e-6
    )
    assert (np.asarray(got)[2] == 0).all() and np.isfinite(scale).all()
    assert np.asarray(got)[4, :3].tolist() == [-largest, 65 if bits == 8 else 4, largest]
    assert np.abs(np.asarray(got)).max() == largest
    error = np.abs(np.asarray(got) * np.asarray(scale) - np.asarray(weight))
    assert (error <= np.asarray(scale) / 2 * 1.0001).all()
    x = gaussian(3, 64, seed=1)
    leaf = QatTensor(weight, bits, "straight_through")
    units = np.abs(np.asarray(x)).max(axis=1, keepdims=True) / 127
    expected = (np.round(np.asarray(x) / units) * units) @ np.asarray(to_array(leaf)).T
    np.testing.assert_allclose(dot(x, leaf, compute=Compute()), expected, atol=1e-4)


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradients_by_choice(backward):
    weight, x, cotangent = gaussian(5, 64), gaussian(3, 64, seed=1), gaussian(3, 5, seed=2)

    def loss(x, weight):
        y = dot(x, QatTensor(weight, 4, backward), compute=Compute())
        return (y * cotangent).sum()

    to_x, to_weight = jax.grad(loss, argnums=(0, 1))(x, weight)
    for got, exact in ((to_x, cotangent @ weight), (to_weight, cotangent.T @ x)):
        error = float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))
        assert error < 1e-5 if backward == "straight_through" else 1e-3 < error < 0.05


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_every_intended_product_is_one_of_integers(bits, backward):
    """The seven linear layers; both products of each one's gradient, where they are quantized."""
    params = wrapped(bits, backward)

    def count(function):
        text = jax.jit(function).lower(params, TOKENS).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        kinds = [line.split(":")[-1] for line in products]
        return sum("xi8>" in kind and "xi32>" in kind for kind in kinds), len(kinds)

    def run(params, tokens):
        return forward(CONFIG, params, tokens)

    assert count(run) == (7, 10)
    gradient = jax.grad(lambda params, tokens: run(params, tokens).sum())
    integer, _ = count(gradient)
    assert integer == (7 if backward == "straight_through" else 21)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_converted_logits_equal_those_of_training(tmp_path, bits, lora):
    """R75, after some steps, through the disk, stacked."""
    params = wrapped(bits, skip=["o_proj", "role:embedding", "role:head"])
    if lora:
        params = trained(CONFIG, add_lora(CONFIG, params, LoraConfig(r=4), jax.random.key(0)))
    method = "lora" if lora else "full"
    part, rest = tree.partition(params, trainable_mask(CONFIG, params, None, method=method))

    @jax.jit
    def step(part):
        def loss(part):
            logits = forward(CONFIG, tree.combine(part, rest), TOKENS)
            return -jax.nn.log_softmax(logits)[:, :-1].mean() + (logits**2).mean()

        return jax.tree.map(lambda w, g: w - 0.1 * g, part, jax.grad(loss)(part))

    after = tree.combine(step(step(part)), rest)
    converted = convert_qat(after)
    leaf = converted["layers"]["mlp"]["up_proj"]["weight"]
    leaf = leaf.base if lora else leaf
    assert isinstance(leaf, IntegerTensor) and leaf.base.scale.dtype == jnp.float32
    assert isinstance(leaf.base, PackedTensor) == (bits == 4)
    assert not isinstance(converted["layers"]["self_attn"]["o_proj"]["weight"], IntegerTensor)
    save_model(tmp_path / "model", CONFIG, converted, None)
    _, served = load_model(tmp_path / "model")
    run = jax.jit(lambda params: forward(CONFIG, params, TOKENS))
    expected = run(after)
    np.testing.assert_allclose(run(served), expected, atol=1e-5)
    plain = tree.map_with_path(lambda _, leaf: to_array(leaf), after)
    assert float(jnp.abs(run(plain) - expected).max()) > 1e-3  # activations are rounded as well
    save_model(tmp_path / "trained", CONFIG, after, None)
    again = load_model(tmp_path / "trained")[1]
    assert has_qat(again) and not has_qat(served)
    np.testing.assert_array_equal(run(again), expected)


def test_sharded_equals_single():
    params = wrapped(8)
    run = jax.jit(lambda params: forward(CONFIG, params, TOKENS))
    expected = run(params)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    spread = jax.device_put(params, shardings(CONFIG, params, mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(spread), expected, atol=2e-2)


def test_what_cannot_be_trained_so_is_refused():
    mixtral = FAMILIES["mixtral"]
    with pytest.raises(ValueError, match="experts are multiplied in groups"):
        add_qat(mixtral, tiny_params(mixtral), bits=8, backward="quantized", skip=None)
    with pytest.raises(ValueError, match="not trained with method qat"):
        convert_qat(PARAMS)
    with pytest.raises(ValueError, match="did you mean 'up_proj'"):
        wrapped(skip=["up_prj"])
