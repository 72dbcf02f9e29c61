"""Paths, partitions and their inverses."""

import jax
import jax.numpy as jnp
import pytest

from llama_jax import tree
from llama_jax.weights.adapted import LoraTensor

ADAPTED = LoraTensor(jnp.ones((3, 2)), jnp.ones((1, 2)), jnp.ones((3, 1)), jnp.float32(2), (1,))
TREE = {"a": {"weight": jnp.zeros(2), "bias": jnp.ones(3)}, "b": {"weight": ADAPTED}}


def test_leaves_stay_whole_and_arrays_do_not():
    assert list(tree.flatten(TREE)) == ["a.bias", "a.weight", "b.weight"]
    assert list(tree.flatten_arrays(TREE))[2:] == [
        "b.weight.base",
        "b.weight.lora_a",
        "b.weight.lora_b",
        "b.weight.scale",
    ]


def test_unflatten_is_the_inverse():
    again = tree.unflatten(tree.flatten(TREE))
    assert jax.tree.structure(again) == jax.tree.structure(TREE)


def test_partition_leaves_holes_and_combine_fills_them():
    mask = tree.map_arrays_with_path(lambda path, _: "lora" in path, TREE)
    selected, rest = tree.partition(TREE, mask)
    assert list(tree.flatten_arrays(selected)) == ["b.weight.lora_a", "b.weight.lora_b"]
    assert len(jax.tree.leaves(rest)) == 4
    combined = tree.combine(selected, rest)
    assert jax.tree.structure(combined) == jax.tree.structure(TREE)
    assert combined["b"]["weight"].lora_a is ADAPTED.lora_a


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", 12), ("bfloat16", 6), ("int8", 3), ("int4", 2)]
)
def test_bytes_count_halves_of_int4(dtype, expected):
    assert tree.num_bytes({"x": jnp.zeros(3, dtype)}) == expected
