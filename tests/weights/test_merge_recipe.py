"""Recipes of merges: each key is checked, and named where it is wrong."""

import pytest

from llama_jax.weights.merge_recipe import read_recipe

CHAT = {"method": "chat_vector", "base": "b", "chat": "c", "target": "t", "ratio": 1}
TIES = {"method": "ties", "base": "b", "models": ["m"], "density": 0.5}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "a recipe is a mapping"),
        ({}, "the recipe has no method"),
        ({**CHAT, "method": "chat_vectors"}, "did you mean 'chat_vector'"),
        ({**CHAT, "ration": 1}, "no field 'ration'; did you mean 'ratio'"),
        ({k: v for k, v in CHAT.items() if k != "ratio"}, "the recipe has no ratio"),
        ({k: v for k, v in CHAT.items() if k != "chat"}, "the recipe has no chat"),
        ({**CHAT, "ratio": "1"}, "ratio is '1'; it must be a finite number"),
        ({**CHAT, "ratio": float("nan")}, "ratio is nan"),
        ({**CHAT, "ratio": True}, "ratio is True"),
        ({**CHAT, "chat": ""}, "chat is ''; it must name"),
        ({**CHAT, "density": 0.5}, "density is set, but method chat_vector does not read it"),
        (
            {**TIES, "models": [{"model": "m", "density": 0.2}]},
            "each of models has its own",
        ),
        ({**CHAT, "dtype": "int8"}, "dtype is 'int8'; allowed are float32"),
        ({**CHAT, "vocabulary": "shared_row"}, "did you mean 'shared_rows'"),
        ({**CHAT, "tokenizer": 3}, "tokenizer is 3"),
        ({**TIES, "models": []}, r"models is \[\]"),
        ({**TIES, "models": "m"}, "give a list of models"),
        ({**TIES, "models": [{"model": "m", "wieght": 1}]}, "did you mean 'weight'"),
        ({**TIES, "models": [{"weight": 1}]}, r"models\[0\] has no model"),
        ({**TIES, "density": 1.5}, "between 0.0 and 1.0"),
        ({"method": "ties", "base": "b", "models": ["m"]}, "density is missing"),
        ({**TIES, "models": [{"model": "m", "weight": 0}]}, "add up to 0"),
        ({**TIES, "method": "dare", "density": 0}, "must be above 0"),
        ({**TIES, "method": "dare", "seed": -1}, "seed is -1"),
        ({**TIES, "method": "dare", "elect_sign": "yes"}, "elect_sign is 'yes'"),
        ({"method": "slerp", "models": ["a", "b", "c"], "t": 0.5}, "exactly two"),
        ({"method": "slerp", "models": ["a", "b"], "t": 2}, "t is 2"),
        ({"method": "linear", "models": [{"model": "a", "density": 1}]}, "no field 'density'"),
    ],
)
def test_recipes_are_checked(recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(recipe, "r.yaml")
    assert str(error.value).startswith("r.yaml: ")
