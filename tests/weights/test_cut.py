"""Cutting: what is kept computes what it did, whatever the family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.model.transformer import forward
from llama_jax.weights.cut import (
    check_smaller,
    evenly,
    first_slices,
    keep_layers,
    keep_units,
)
from llama_jax.weights.quantize import quantize
from llama_jax.weights.table import abstract_params
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

FOUR = tiny_config(num_hidden_layers=4, attention_bias=True, mlp_bias=True)


def logits(config, params):
    return forward(config, params, jnp.asarray(tiny_tokens()))


def zeroed(params, axis_rows):
    """The same model with parts of weights set to zero: path -> (dim, indices)."""
    leaves = tree.flatten(params)
    for path, (layer, dim, where) in axis_rows:
        array = np.array(leaves[path])
        index = [slice(None)] * (array.ndim - 1)
        index[dim] = where
        array[layer][tuple(index)] = 0
        leaves[path] = jnp.asarray(array)
    return tree.unflatten(leaves)


def test_layers_are_spread_evenly():
    assert evenly(30, 15)[0] == 0 and evenly(30, 15)[-1] == 29 and len(set(evenly(30, 15))) == 15
    assert evenly(4, 2) == (0, 3) and evenly(5, 3) == (0, 2, 4) and evenly(3, 1) == (0,)
    assert evenly(6, 6) == tuple(range(6))
    with pytest.raises(ValueError, match="5 of 4 layers"):
        evenly(4, 5)


def test_dropped_layers_are_layers_that_add_nothing():
    params = tiny_params(FOUR)
    idle = [
        (f"layers.{name}", (layer, 0, slice(None)))
        for layer in (1, 3)
        for name in (
            "self_attn.o_proj.weight",
            "self_attn.o_proj.bias",
            "mlp.down_proj.weight",
            "mlp.down_proj.bias",
        )
    ]
    config, kept = keep_layers(FOUR, params, (0, 2))
    assert config.num_hidden_layers == 2
    np.testing.assert_allclose(logits(config, kept), logits(FOUR, zeroed(params, idle)), atol=1e-5)


def test_dropped_heads_and_units_are_such_that_add_nothing():
    """Of each layer its own: key/value head 1 in layer 0, head 0 in the others."""
    params = tiny_params(FOUR)
    kept_kv = np.asarray([[0], [1], [1], [1]])
    kept_q = kept_kv * 2 + np.arange(2)
    rng = np.random.default_rng(0)
    kept_mlp = np.stack([np.sort(rng.permutation(96)[:40]) for _ in range(4)])
    idle = []
    for layer in range(4):
        gone = np.setdiff1d(np.arange(4 * 16), (kept_q[layer][:, None] * 16 + np.arange(16)))
        idle.append(("layers.self_attn.o_proj.weight", (layer, 1, gone)))
        gone = np.setdiff1d(np.arange(96), kept_mlp[layer])
        idle.append(("layers.mlp.down_proj.weight", (layer, 1, gone)))
    config, kept = keep_units(FOUR, params, kv_heads=kept_kv, query_heads=kept_q, mlp=kept_mlp)
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    assert sizes == (2, 1, 40) and config.head_dim == 16
    np.testing.assert_allclose(logits(config, kept), logits(FOUR, zeroed(params, idle)), atol=1e-5)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "mixtral", "llama-head-dim"])
def test_first_slices_fit_the_smaller_config(family):
    config = FAMILIES[family]
    wanted = config.replace(
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    found, params = first_slices(config, tiny_params(config), wanted)
    assert found == wanted
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == jax.tree.map(lambda x: x.shape, abstract_params(wanted))
    np.testing.assert_array_equal(
        params["embed_tokens"]["weight"], tiny_params(config)["embed_tokens"]["weight"][:, :32]
    )
    assert np.isfinite(logits(wanted, params)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but .* only 2"),
        ({"num_key_value_heads": 1}, "makes 4 query heads"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, but slices"),
        ({"vocab_size": 100}, "vocab_size is 100, but slices"),
    ],
)
def test_a_cut_only_makes_smaller(changes, message):
    with pytest.raises(ValueError, match=message):
        check_smaller(tiny_config(), tiny_config(**changes))


def test_quantized_weights_are_not_cut():
    from llama_jax.weights.cut import check_plain

    with pytest.raises(ValueError, match="down_proj.weight is quantized"):
        check_plain(quantize(FOUR, tiny_params(FOUR), scheme="int8"))
