"""Sequences divided over devices: the order inside, and the same numbers as undivided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import DEFAULT_RULES, Compute
from llama_jax.mesh.sequence import balanced_places, from_balanced, in_text_order, to_balanced
from llama_jax.mesh.sharding import batch_sharding, make_mesh, shardings
from llama_jax.model import transformer
from llama_jax.model.attention import causal_mask
from tests.tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly


def test_every_part_has_the_same_work():
    places = balanced_places(16, 4)
    assert places.tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    mask = causal_mask(places[None], np.arange(16)[None], sliding_window=None)[0]
    assert mask.reshape(4, -1).sum(axis=1).tolist() == [34] * 4


@pytest.mark.parametrize("sizes", [{"context": 8}, {"data": 2, "context": 4}, {"context": 2}])
def test_there_and_back(sizes):
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, devices=jax.devices()[:count])
    parts = sizes["context"]
    x = jnp.arange(2 * 32 * 3.0).reshape(2, 32, 3)
    with jax.set_mesh(mesh):
        inside = jax.jit(lambda x: to_balanced(x, DEFAULT_RULES))(x)
        back = jax.jit(lambda x: from_balanced(x, DEFAULT_RULES))(inside)
    np.testing.assert_array_equal(inside, x[:, balanced_places(32, parts)])
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(in_text_order(inside, parts, 1), x)


SEGMENTS = np.asarray([[1] * 5 + [2] * 20 + [3] * 3 + [0] * 4, [1] * 32], np.int32)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("layers", ["stacked", "unrolled"])
def test_packed_rows_and_windows(window, layers):
    config = tiny_config(sliding_window=window)
    params, tokens = tiny_params(config), tiny_tokens(2, 32)
    compute = Compute()

    def run(params, tokens, segments):
        if layers == "unrolled":
            from llama_jax.model.layout import unstack_layers

            params = unstack_layers(params)
        return transformer.forward(config, params, tokens, compute=compute, segment_ids=segments)

    expected = run(params, tokens, SEGMENTS)
    mesh = make_mesh({"data": 2, "context": 4})
    placed = jax.device_put(params, shardings(config, params, mesh))
    place = batch_sharding(mesh)
    assert place.shard_shape((2, 32)) == (1, 8)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(placed, *jax.device_put((tokens, SEGMENTS), place))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_length_that_cannot_be_divided_stays_whole():
    config = tiny_config()
    params, tokens = tiny_params(config), tiny_tokens(2, 13)
    expected = transformer.forward(config, params, tokens)
    with jax.set_mesh(make_mesh({"context": 8})):
        got = jax.jit(lambda p, t: transformer.forward(config, p, t))(params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)
