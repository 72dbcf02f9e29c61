"""Trees of parameters as nested dictionaries, with paths written `layers.self_attn.q_proj.weight`.

A weight leaf may be an array, a quantized tensor or an adapted tensor. `flatten` keeps such leaves
whole, because the weight table has one row for each; `flatten_arrays` goes down to the arrays
inside, because optimizers, masks and checkpoints work on those.
"""

from collections.abc import Callable
from typing import Any

import jax

Tree = Any


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"no name for the tree key {key!r}")


def path_string(path: tuple[Any, ...]) -> str:
    """`(DictKey('norm'), DictKey('weight'))` -> `norm.weight`."""
    return ".".join(_name(key) for key in path)


def is_node(value: Any) -> bool:
    """Whether `value` is a container of weights rather than a weight."""
    return isinstance(value, dict | list | tuple)


def flatten(tree: Tree) -> dict[str, Any]:
    """Path -> weight leaf, in tree order. Quantized and adapted tensors stay whole."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: not is_node(x))
    return {path_string(path): leaf for path, leaf in pairs}


def flatten_arrays(tree: Tree) -> dict[str, Any]:
    """Path -> array, in tree order, going into quantized and adapted tensors."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_string(path): leaf for path, leaf in pairs}


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dictionary of `flatten`'s pairs."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        *parents, last = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`function(path, leaf, …)` on every weight leaf; the containers are rebuilt."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_string(path), *leaves),
        tree,
        *rest,
        is_leaf=lambda x: not is_node(x),
    )


def map_arrays_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`function(path, array, …)` on every array, inside quantized and adapted tensors too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *arrays: function(path_string(path), *arrays), tree, *rest
    )


def partition(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Splits into `(selected, rest)` by a tree of booleans over the arrays.

    Both results have the structure of `tree` with None, an empty subtree to JAX, in place of what
    the other one holds: gradients and optimizer state taken over `selected` have no entry for the
    rest. `combine` puts them together again.
    """
    selected = jax.tree.map(lambda x, keep: x if keep else None, tree, mask)
    rest = jax.tree.map(lambda x, keep: None if keep else x, tree, mask)
    return selected, rest


def combine(selected: Tree, rest: Tree) -> Tree:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, selected, rest, is_leaf=lambda x: x is None
    )


def num_bytes(tree: Tree) -> int:
    """Bytes of all arrays in `tree`, counting int4 as half a byte."""
    return sum(
        (array.size * jax.dtypes.itemsize_bits(array.dtype) + 7) // 8
        for array in jax.tree.leaves(tree)
    )
