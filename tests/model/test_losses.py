"""Chunked cross entropy equals the plain one, in value and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.model import transformer
from llama_jax.model.context import restarted_positions
from llama_jax.model.losses import Batch, cross_entropy, next_token_loss
from llama_jax.weights.adapted import LoraTensor
from tests.tiny import FAMILIES, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly


def make_batch(tokens, mask=None, segment_ids=None):
    targets = np.roll(tokens, -1, axis=1)
    mask = np.ones_like(tokens) if mask is None else np.array(mask)
    mask = mask.copy()
    mask[:, -1] = 0
    segments = np.ones_like(tokens) if segment_ids is None else np.asarray(segment_ids)
    positions = np.asarray(restarted_positions(jnp.asarray(segments)))
    return Batch(tokens, targets, mask, segments.astype(np.int32), positions)


def plain_loss(config, params, batch, compute):
    logits = transformer.forward(
        config, params, batch.tokens, compute=compute, segment_ids=batch.segment_ids
    )
    logp = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch.loss_mask.astype(jnp.float32))


@pytest.mark.parametrize("family", ["llama-tied", "llama-gqa"])
@pytest.mark.parametrize("chunk", [1, 5, 7, 1000])
def test_loss_and_gradients_equal_the_plain_form(family, chunk):
    config = FAMILIES[family]
    params = tiny_params(config)
    mask = np.random.default_rng(1).integers(0, 2, (3, 11))
    batch = make_batch(tiny_tokens(3, 11), mask)
    compute = Compute(loss_chunk_tokens=chunk)

    def chunked(params):
        loss, weight, _ = next_token_loss(config, params, batch, compute=compute)
        return loss, weight

    (loss, weight), gradients = jax.jit(jax.value_and_grad(chunked, has_aux=True))(params)
    expected, plain = jax.value_and_grad(plain_loss, argnums=1)(config, params, batch, compute)
    assert float(weight) == mask[:, :-1].sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for path, leaf in tree.flatten(gradients).items():
        scale = float(jnp.abs(tree.flatten(plain)[path]).max()) + 1e-6
        np.testing.assert_allclose(leaf, tree.flatten(plain)[path], atol=2e-6 * scale, err_msg=path)


def test_an_adapted_head_gets_gradients_for_its_factors_only():
    key = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(key[0], (2, 6, 8))
    base = jax.random.normal(key[1], (10, 8))
    a, b = jax.random.normal(key[2], (2, 8)), jax.random.normal(key[3], (10, 2))
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 10, (2, 6)))
    mask = jnp.ones((2, 6))

    def loss(factors, base, chunk):
        head = LoraTensor(base, *factors, jnp.float32(0.5), (2,))
        compute = Compute(loss_chunk_tokens=chunk)
        return cross_entropy(hidden, head, targets, mask, compute=compute)

    def merged(factors):
        full = base + 0.5 * factors[1] @ factors[0]
        logp = jax.nn.log_softmax(hidden @ full.T)
        return -jnp.take_along_axis(logp, targets[..., None], -1).sum()

    got = jax.grad(loss)((a, b), base, 4)
    for ours, theirs in zip(got, jax.grad(merged)((a, b)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # The frozen base never gets a gradient array: nothing of its shape is made in the backward.
    text = jax.jit(jax.grad(loss), static_argnums=2).lower((a, b), base, 4).as_text()
    assert text.count("-> tensor<10x8xf32>") == 0


def test_equal_logits_in_bfloat16_give_the_log_of_the_vocabulary():
    vocab = 128256
    hidden, head = jnp.zeros((1, 2, 4), jnp.bfloat16), jnp.ones((vocab, 4), jnp.bfloat16)
    loss = cross_entropy(
        hidden, head, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)), compute=Compute("bfloat16")
    )
    np.testing.assert_allclose(loss / 2, 11.76178, atol=1e-4)


def test_packed_segments_count_five_tokens():
    config = FAMILIES["llama-gqa"]
    segments = np.array([[1, 1, 2, 2, 3, 0]])
    batch = make_batch(tiny_tokens(1, 6), (segments > 0).astype(int), segments)
    _, weight, _ = next_token_loss(config, tiny_params(config), batch, compute=Compute())
    assert float(weight) == 5.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_padding_stay_finite(dtype):
    config = FAMILIES["mistral"]
    params = tiny_params(config)
    segments = np.array([[1] * 12, [0] * 12])
    batch = make_batch(tiny_tokens(2, 12), (segments > 0).astype(int), segments)
    compute = Compute(dtype=dtype, remat="full")

    def loss(params):
        return next_token_loss(config, params, batch, compute=compute)[0]

    value, gradients = jax.value_and_grad(loss)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
