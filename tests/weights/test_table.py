"""The table covers every leaf once and gives HF's own names."""

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.weights.table import abstract_params, init_params, num_parameters, weight_table
from tests.reference import reference_model
from tests.tiny import FAMILIES, tiny_params


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_leaves_are_the_same_set(family):
    config = FAMILIES[family]
    table = weight_table(config)
    leaves = tree.flatten(init_params(config, jax.random.key(0)))
    abstract = tree.flatten(abstract_params(config, dtype="bfloat16"))
    assert list(table) == list(leaves) or set(table) == set(leaves)
    for path, row in table.items():
        assert leaves[path].shape == abstract[path].shape == row.shape
        assert len(row.axes) == len(row.shape)
        assert abstract[path].dtype == "bfloat16"
    assert num_parameters(config) == sum(leaf.size for leaf in leaves.values())


@pytest.mark.parametrize("family", ["llama-biases", "llama-tied", "mistral"])
def test_names_are_those_of_transformers(family):
    config = FAMILIES[family]
    names = [name for row in weight_table(config).values() for name, _ in row.hf_names()]
    assert len(names) == len(set(names))
    state = reference_model(config, tiny_params(config)).state_dict()
    expected = set(state) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert set(names) == expected


def test_expert_names_count_layers_and_experts():
    config = FAMILIES["mixtral"]
    row = weight_table(config)["layers.block_sparse_moe.experts.w2.weight"]
    named = dict(row.hf_names())
    assert len(named) == 2 * 4
    assert named["model.layers.1.block_sparse_moe.experts.3.w2.weight"] == (1, 3)


def test_fresh_parameters_are_drawn_as_transformers_draws_them():
    config = FAMILIES["llama-biases"].replace(hidden_size=256, initializer_range=0.05)
    leaves = tree.flatten(init_params(config, jax.random.key(0)))
    drawn = np.asarray(leaves["layers.self_attn.q_proj.weight"])
    np.testing.assert_allclose(drawn.std(), 0.05, rtol=0.05)
    assert (leaves["norm.weight"] == 1).all()
    assert (leaves["layers.mlp.up_proj.bias"] == 0).all()
    again = tree.flatten(init_params(config, jax.random.key(0)))
    other = tree.flatten(init_params(config, jax.random.key(1)))
    for path, row in weight_table(config).items():
        np.testing.assert_array_equal(leaves[path], again[path])
        if row.role == "matrix":
            assert (leaves[path] != other[path]).any()
