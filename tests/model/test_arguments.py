"""What is no model, or no array of ids, is named with what is allowed."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from infer.generate import Generator
from llama_jax.model import transformer
from llama_jax.model.arguments import check_params
from llama_jax.model.layout import for_decoding, unstack_layers
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"config": {}}, "config is of type dict; give a ModelConfig"),
        ({"params": None}, "params is of type NoneType; give the tree"),
        (
            {"params": {"layers": {}}},
            "params holds layers, but no embed_tokens, norm; give the whole",
        ),
        ({"tokens": [[1, 2]]}, "tokens is of type list; give an integer array"),
        ({"tokens": np.zeros(4, np.int32)}, r"tokens is int32 of shape \(4,\); give an integer"),
        ({"tokens": np.zeros((1, 4))}, r"tokens is float64 of shape \(1, 4\)"),
        ({"compute": "bfloat16"}, "compute is of type str; give a Compute"),
        (
            {"positions": np.zeros((1, 3), np.int32)},
            r"positions has shape \(1, 3\), but tokens \(1, 4",
        ),
        ({"segment_ids": [0]}, "segment_ids is of type list"),
    ],
)
def test_arguments_of_another_type_are_named(wrong, message):
    config = FAMILIES["llama-gqa"]
    given = {"config": config, "params": tiny_params(config), "tokens": tiny_tokens(1, 4)} | wrong
    # Users have it without the checks of shapes that tests put around it.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(transformer.forward)(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"intermediate_size": 112},
            r"layers.mlp.gate_proj.weight has shape \(2, 96, 64\) in params and "
            r"\(2, 112, 64\) by config",
        ),
        ({"num_hidden_layers": 3}, r"\(2, 64\) in params and \(3, 64\) by config"),
        ({"tie_word_embeddings": True}, "lm_head.weight has shape .* in params and none by"),
        ({"attention_bias": True}, "q_proj.bias has shape none in params and"),
    ],
)
def test_parameters_of_another_model_are_named(changes, message):
    config = FAMILIES["llama-gqa"]
    params, other = tiny_params(config), config.replace(**changes)
    with pytest.raises(ValueError, match=message):
        transformer.forward(other, params, tiny_tokens(1, 4))
    with pytest.raises(ValueError, match=message):
        Generator(other, params)
    with pytest.raises(ValueError, match=r"in params and .* by config"):
        transformer.forward(other, unstack_layers(params), tiny_tokens(1, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_apart_are_those_of_the_model(family):
    config = FAMILIES[family]
    params = tiny_params(config)
    check_params(config, params)
    check_params(config, for_decoding(params))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[3, -1]], "tokens holds the id -1; the model's are 0 to 127"),
        ([[3, 128]], "tokens holds the id 128; the model's are 0 to 127"),
        ([[]], r"tokens is int32 of shape \(1, 0\); give an integer array"),
    ],
)
def test_ids_that_are_none_are_refused(tokens, message):
    """transformers raises an IndexError; an array of JAX would take a row from the end, or NaN."""
    config = tiny_config()
    for kind in (np, jnp):
        with pytest.raises(ValueError, match=message):
            transformer.forward(config, tiny_params(config), kind.asarray(tokens, np.int32))
