"""Keys and values in int8: how far from what was stored, and what that does to logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import CACHE_DTYPES, Compute
from llama_jax.kernels.rounded import as_held, empty, token_bytes
from llama_jax.model import layout, transformer
from llama_jax.model.cache import init_cache
from tests.tiny import FAMILIES, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly


def test_no_number_is_further_than_a_254th_of_its_heads_largest():
    rng = np.random.default_rng(0)
    new = (rng.standard_t(2, (3, 5, 2, 32)) * 10.0 ** rng.integers(-20, 20, (3, 5, 2, 1))).astype(
        np.float32
    )
    new[0, 0] = 0
    held = as_held(jnp.asarray(new), empty(new.shape, head_axis=-1, dtype="int8"))
    assert held.codes.dtype == jnp.int8 and held.scale.shape == (3, 5, 2, 1)
    got = np.asarray(held.codes, np.float32) * np.asarray(held.scale)
    bound = np.abs(new).max(axis=-1, keepdims=True) / 254
    assert (np.abs(got - new) <= bound * (1 + 1e-5)).all()
    assert (np.abs(got - new) > bound / 4).any()  # it is no tighter than it must be


def test_what_is_not_finite_stays_so():
    new = jnp.asarray([[[[1.0, jnp.nan], [1.0, jnp.inf], [1.0, 2.0]]]])
    held = as_held(new, empty(new.shape, head_axis=-1, dtype="int8"))
    finite = np.isfinite(jnp.asarray(held.codes, jnp.float32) * held.scale)
    assert finite[0, 0].all(axis=-1).tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_bytes_of_a_token(dtype):
    config = FAMILIES["llama-gqa"]
    cache = init_cache(config, 3, 20, dtype=dtype, stacked=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
    assert size == 60 * token_bytes(config, dtype)


@pytest.mark.parametrize(
    "family, stacked, dtype, bound",
    [
        ("llama-gqa", True, "int8", 0.02),
        ("llama-gqa", False, "int8", 0.02),
        ("mixtral", True, "int8", 0.02),
        ("mistral", False, "int8", 0.02),
        ("llama-gqa", False, "bfloat16", 0.01),
        ("llama-gqa", True, "float16", 0.001),
    ],
)
def test_logits_through_a_narrow_cache_are_near_those_through_a_wide_one(
    family, stacked, dtype, bound
):
    """The error of all logits, relative to them: root of the sums of squares."""
    config = FAMILIES[family]
    params = tiny_params(config)
    tokens = jnp.asarray(tiny_tokens(2, 20))
    run = params if stacked else layout.for_decoding(params)
    compute = Compute(cache_dtype=dtype)
    cache = init_cache(config, 2, 24, dtype=compute.held_dtype, stacked=stacked)
    step = jax.jit(lambda c, t: transformer.decode(config, run, c, t, compute=compute))
    expected = transformer.forward(config, params, tokens)
    got, cache = step(cache, tokens[:, :13])
    rows = [got]
    for place in range(13, 20):
        got, cache = step(cache, tokens[:, place : place + 1])
        rows.append(got)
    error = np.asarray(jnp.stack(rows, axis=1) - expected[:, 12:])
    relative = np.linalg.norm(error) / np.linalg.norm(expected[:, 12:])
    assert 1e-6 < relative < bound
    assert cache.lengths.tolist() == [20, 20]
