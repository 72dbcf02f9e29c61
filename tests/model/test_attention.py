"""Who sees whom, and that nothing becomes NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.attention import attend, causal_mask
from llama_jax.model.transformer import forward
from tests.tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly


def visible(window, length=5, **segments):
    places = jnp.arange(length)[None]
    mask = causal_mask(places, places, sliding_window=window, **segments)
    return [np.flatnonzero(row).tolist() for row in np.asarray(mask[0])]


def test_a_window_counts_the_query_itself():
    seen = visible(3)
    assert [len(row) for row in seen] == [1, 2, 3, 3, 3]
    assert seen[4] == [2, 3, 4]


@pytest.mark.parametrize("window", [None, 4096, 10])
def test_a_window_no_shorter_than_the_text_is_full_attention(window):
    base = tiny_config(model_type="mistral")
    params, tokens = tiny_params(base), tiny_tokens(1, 10)
    windowed = tiny_config(model_type="mistral", sliding_window=window)
    np.testing.assert_array_equal(forward(base, params, tokens), forward(windowed, params, tokens))


def test_a_window_changes_what_lies_beyond_it():
    base, short = tiny_config(model_type="mistral"), tiny_config(sliding_window=3)
    params, tokens = tiny_params(base), tiny_tokens(1, 10)
    full, windowed = forward(base, params, tokens), forward(short, params, tokens)
    np.testing.assert_allclose(full[:, :3], windowed[:, :3], atol=1e-6)
    assert float(jnp.abs(full[:, 5:] - windowed[:, 5:]).max()) > 1e-2


def test_segments_see_only_themselves_and_padding_sees_padding():
    ids = jnp.asarray([[1, 1, 2, 0, 0]])
    seen = visible(None, query_segments=ids, key_segments=ids)
    assert seen == [[0], [0, 1], [2], [3], [3, 4]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 6])
def test_attend_equals_plain_softmax_attention(dtype, length):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, length, 4, 8)).astype(dtype)
    k = jax.random.normal(keys[1], (2, 2, 8, 6)).astype(dtype)
    v = jax.random.normal(keys[2], (2, 2, 6, 8)).astype(dtype)
    places = jnp.arange(6)[None]
    mask = causal_mask(places[:, -length:], places, sliding_window=None)
    got = attend(q, k, v, mask)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    full_k, full_v = jnp.repeat(wide[1], 2, axis=1), jnp.repeat(wide[2], 2, axis=1)
    scores = jnp.einsum("btnh,bnhs->bnts", wide[0], full_k) / np.sqrt(8.0)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bnts,bnsh->btnh", weights, full_v)
    assert got.dtype == q.dtype
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_with_nothing_to_see_stays_finite(dtype):
    q = jnp.ones((1, 2, 2, 8), dtype)
    k, v = jnp.ones((1, 1, 8, 4), dtype), jnp.ones((1, 1, 4, 8), dtype)
    mask = jnp.zeros((1, 2, 4), bool)

    def total(q, k, v):
        return attend(q, k, v, mask).astype(jnp.float32).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g.astype(jnp.float32)).all() for g in gradients)
