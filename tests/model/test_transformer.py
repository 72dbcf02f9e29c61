"""Logits equal transformers' for every family and head layout; the ways of running agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.model import layout, transformer
from llama_jax.model.cache import init_cache
from tests.reference import reference_logits, reference_model
from tests.tiny import FAMILIES, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    config = FAMILIES[family]
    params = tiny_params(config)
    tokens = tiny_tokens(1, 40)
    expected = reference_logits(reference_model(config, params), tokens)
    got = jax.jit(lambda p, t: transformer.forward(config, p, t))(params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    unrolled = transformer.forward(config, layout.unstack_layers(params), tokens)
    np.testing.assert_allclose(unrolled, got, atol=2e-6, rtol=0)
    prepared = transformer.forward(config, layout.for_decoding(params), tokens)
    np.testing.assert_allclose(prepared, got, atol=5e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-biases", "mistral", "mixtral", "yarn-rope"])
@pytest.mark.parametrize("stacked", [True, False])
def test_prefill_and_decode_equal_one_full_pass(family, stacked):
    config = FAMILIES[family]
    params = tiny_params(config)
    tokens = jnp.asarray(tiny_tokens(2, 20))
    expected = transformer.forward(config, params, tokens)
    run = params if stacked else layout.for_decoding(params)
    step = jax.jit(
        lambda p, c, t: transformer.decode(config, p, c, t, compute=Compute()), donate_argnums=1
    )
    cache = init_cache(config, 2, 24, stacked=stacked)
    got, cache = step(run, cache, tokens[:, :9])
    np.testing.assert_allclose(got, expected[:, 8], atol=1e-5)
    got, cache = step(run, cache, tokens[:, 9:13])  # a second chunk of the prompt
    np.testing.assert_allclose(got, expected[:, 12], atol=1e-5)
    for place in range(13, 20):
        got, cache = step(run, cache, tokens[:, place : place + 1])
        np.testing.assert_allclose(got, expected[:, place], atol=1e-5)
    assert cache.lengths.tolist() == [20, 20]


def test_rows_of_different_length_give_what_each_gives_alone():
    config = FAMILIES["mistral"]
    params = tiny_params(config)
    rows = [tiny_tokens(1, 3, seed=1), tiny_tokens(1, 8, seed=2)]
    padded = np.zeros((2, 12), np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: tokens.shape[1]] = tokens[0]
    cache = init_cache(config, 2, 32, stacked=True)
    compute = Compute()
    lengths = jnp.asarray([3, 8])
    got, cache = transformer.decode(
        config, params, cache, jnp.asarray(padded), compute=compute, num_real=lengths, visible=12
    )
    alone = [init_cache(config, 1, 32, stacked=True) for _ in rows]
    for index, tokens in enumerate(rows):
        expected, alone[index] = transformer.decode(
            config, params, alone[index], jnp.asarray(tokens), compute=compute
        )
        np.testing.assert_allclose(got[index], expected[0], atol=1e-5)
    for _ in range(6):
        tokens = jnp.argmax(got, axis=-1)[:, None].astype(jnp.int32)
        got, cache = transformer.decode(config, params, cache, tokens, compute=compute)
        for index in range(2):
            expected, alone[index] = transformer.decode(
                config, params, alone[index], tokens[index : index + 1], compute=compute
            )
            np.testing.assert_allclose(got[index], expected[0], atol=1e-5)
            assert int(jnp.argmax(got[index])) == int(jnp.argmax(expected[0]))


def test_packed_documents_do_not_see_each_other():
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    segments = np.array([[1, 1, 1, 2, 2, 2]], np.int32)
    first, second = tiny_tokens(1, 3, seed=1), tiny_tokens(1, 3, seed=2)
    other = tiny_tokens(1, 3, seed=3)

    def logits(left):
        packed = np.concatenate([left, second], axis=1)
        return transformer.forward(config, params, packed, segment_ids=jnp.asarray(segments))

    np.testing.assert_array_equal(logits(first)[:, 3:], logits(other)[:, 3:])
    alone = transformer.forward(config, params, second)
    np.testing.assert_allclose(logits(first)[:, 3:], alone, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_recomputation_changes_no_gradient(remat):
    config = FAMILIES["llama-tied"]
    params = tiny_params(config)
    tokens = tiny_tokens(2, 10)

    def loss(params, remat):
        return jnp.square(
            transformer.forward(config, params, tokens, compute=Compute(remat=remat))
        ).mean()

    plain, again = jax.grad(loss)(params, "none"), jax.grad(loss)(params, remat)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_bfloat16_compute_keeps_float32_where_it_matters():
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    tokens = tiny_tokens(1, 16)
    jaxpr = str(
        jax.make_jaxpr(
            lambda p: transformer.forward(config, p, tokens, compute=Compute(dtype="bfloat16"))
        )(params)
    )
    for line in jaxpr.splitlines():
        if "= exp " in line or "= cos " in line or "= rsqrt " in line:
            assert "bf16" not in line, line
    wide = transformer.forward(config, params, tokens)
    narrow = transformer.forward(config, params, tokens, compute=Compute(dtype="bfloat16"))
    assert narrow.dtype == jnp.float32
    assert float(jnp.abs(wide - narrow).max()) < 0.15 * float(jnp.abs(wide).max())
