"""Routing by hand-computed values; both ways to run agree; nothing depends on neighbours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llama_jax.config import Compute
from llama_jax.kernels import megablox
from llama_jax.mesh.flops import count_flops
from llama_jax.mesh.sharding import make_mesh
from llama_jax.model import moe, transformer
from tests.reference import reference_model
from tests.tiny import FAMILIES, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

CONFIG = FAMILIES["mixtral"]


def test_router_weights_of_the_two_chosen_experts():
    weights, experts, probabilities = moe.route(jnp.asarray([[1.0, 2.0, 3.0, 0.0]]), 2)
    assert experts.tolist() == [[2, 1]]
    np.testing.assert_allclose(weights, [[0.731059, 0.268941]], atol=1e-6)
    np.testing.assert_allclose(probabilities[0, 2], 0.643914, atol=1e-6)


def test_the_router_is_float32_whatever_the_input():
    weights, _, probabilities = moe.route(jnp.asarray([[1.0, 1.01]], jnp.bfloat16), 1)
    assert weights.dtype == probabilities.dtype == jnp.float32


def inputs(tokens=24, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (tokens, 16))
    w1, w3 = (jax.random.normal(k, (4, 24, 16)) * 0.2 for k in keys[1:3])
    w2 = jax.random.normal(keys[3], (4, 16, 24)) * 0.2
    weights, experts, _ = moe.route(jax.random.normal(keys[4], (tokens, 4)), 2)
    return x[None], weights[None], experts[None], w1, w2, w3


def test_grouped_equals_dense_forward_and_backward():
    x, weights, experts, w1, w2, w3 = inputs()

    def loss(x, w1, w2, w3, way):
        mixed = moe.mix(x, weights, experts, w1, w2, w3, compute=Compute(moe=way))
        return jnp.sum(jnp.sin(mixed)), mixed

    results = [
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(x, w1, w2, w3, way)
        for way in ("dense", "grouped")
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("way", ["dense", "grouped"])
def test_a_crowded_expert_drops_no_token(way):
    x, weights, _, w1, w2, w3 = inputs()
    crowded = jnp.broadcast_to(jnp.asarray([2, 0]), weights.shape)
    compute = Compute(moe=way)
    together = moe.mix(x, weights, crowded, w1, w2, w3, compute=compute)
    for index in range(0, x.shape[1], 7):
        one = (slice(None), slice(index, index + 1))
        alone = moe.mix(x[one], weights[one], crowded[one], w1, w2, w3, compute=compute)
        np.testing.assert_allclose(together[one], alone, atol=1e-5)


@pytest.mark.parametrize("chunk", [24, 12, 5])
def test_tokens_go_through_in_chunks_with_the_same_result(chunk):
    """As many as there are, half of them, and a number that does not divide them."""
    x, weights, experts, w1, w2, w3 = inputs()
    compute = Compute(remat="full", moe_chunk_tokens=chunk)

    def loss(x, weights, w1, w2, w3, compute):
        mixed = moe.mix(x, weights, experts, w1, w2, w3, compute=compute)
        return jnp.sum(jnp.sin(mixed)), mixed

    results = [
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(
            x, weights, w1, w2, w3, each
        )
        for each in (Compute(), compute)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("trained", [(0, 1), (0, 1, 2, 3, 4)], ids=["frozen", "trained"])
def test_chunks_multiply_no_more_than_a_layer_that_is_recomputed(trained):
    """Nor do frozen experts get a gradient that nobody asks for."""
    arrays = inputs()

    def count(chunk):
        compute = Compute(remat="full", moe_chunk_tokens=chunk)

        @jax.checkpoint
        def layer(x, weights, w1, w2, w3):
            return x + moe.mix(x, weights, arrays[2], w1, w2, w3, compute=compute)

        def loss(*floats):
            return layer(*floats).sum()

        gradient = jax.jit(jax.grad(loss, argnums=trained))
        return count_flops(gradient.trace(*arrays[:2], *arrays[3:]).jaxpr)

    assert count(6) == count(24) > 0


def test_gradients_of_chunks_are_summed_in_float32():
    """A thousand equal terms: a sum in bfloat16 stops growing at 256 of them."""
    x, weights, experts, *matrices = inputs(tokens=1)
    x, weights, experts = (jnp.repeat(array, 1000, axis=1) for array in (x, weights, experts))
    x, *matrices = (array.astype(jnp.bfloat16) for array in (x, *matrices))

    def gradient(compute):
        def loss(w1):
            mixed = moe.mix(x, weights, experts, w1, *matrices[1:], compute=compute)
            return mixed.astype(jnp.float32).sum()

        return jax.grad(loss)(matrices[0]).astype(jnp.float32)

    compute = Compute(dtype="bfloat16", remat="full", moe_chunk_tokens=1)
    whole = gradient(Compute(dtype="bfloat16"))
    np.testing.assert_allclose(gradient(compute), whole, rtol=0.02, atol=0.02 * abs(whole).max())


@pytest.mark.parametrize(
    ("kernel", "chunk"), [("grouped", 8192), ("megablox", 8192), ("grouped", 16), ("megablox", 16)]
)
@pytest.mark.parametrize(
    "sizes", [{"expert": 4, "tensor": 2}, {"data": 2, "expert": 2, "context": 2}], ids=str
)
def test_experts_on_several_devices_equal_one(sizes, kernel, chunk, monkeypatch):
    """Forward and backward, evenly routed and with all tokens at one expert, all tokens at once and
    in two chunks."""
    monkeypatch.setattr(megablox, "grouped_dot", partial(megablox.grouped_dot, interpret=True))
    x, weights, routed, *matrices = inputs(tokens=32)
    x, weights, routed = (array.reshape(8, 4, -1) for array in (x, weights, routed))
    compute = Compute(moe=kernel, remat="full", moe_chunk_tokens=chunk)

    def loss(x, weights, experts, *matrices, compute):
        mixed = moe.mix(x, weights, experts, *matrices, compute=compute)
        return jnp.sum(jnp.sin(mixed)), mixed

    for experts in (routed, jnp.broadcast_to(jnp.asarray([3, 1]), routed.shape)):
        arrays = (x, weights, experts, *matrices)
        both = partial(jax.value_and_grad, argnums=(0, 1, 3, 4, 5), has_aux=True)
        expected = both(partial(loss, compute=Compute(moe="dense")))(*arrays)
        # The kernel's own code promotes.
        promotion = jax.numpy_dtype_promotion("standard" if kernel == "megablox" else "strict")
        with jax.set_mesh(make_mesh(sizes)), promotion:
            got = jax.jit(both(partial(loss, compute=compute)))(*arrays)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_share_of_rows_that_hold_a_token():
    assert moe.computed_share(2, 8, 1) == 1
    assert moe.computed_share(2, 8, 4) == 0.25  # two experts a device, room for both choices
    assert moe.computed_share(2, 8, 8) == 0.25


@pytest.mark.parametrize("padded", [False, True])
def test_balancing_loss_equals_transformers(padded):
    params, tokens = tiny_params(CONFIG), tiny_tokens(2, 12)
    segments = np.ones_like(tokens)
    if padded:
        segments[1, 8:] = 0
    _, _, stats = transformer.hidden_states(
        CONFIG, params, tokens, compute=Compute(), segment_ids=jnp.asarray(segments)
    )
    model = reference_model(CONFIG, params)
    with torch.no_grad():
        attention = torch.from_numpy(segments).long()
        out = model(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=attention,
            output_router_logits=True,
        )
        expected = load_balancing_loss_func(out.router_logits, 4, 2, attention)
    np.testing.assert_allclose(moe.balancing_loss(stats), expected.item(), rtol=1e-5)
