"""Weights that are trained beside a model and are no part of it, such as a distillation's
projections: they have gradients and moments and are in a run's checkpoints, never in its model.

In the state they stand apart. For the gradient and the optimizer they are one more branch of the
trained tree.
"""

from typing import Any

import jax

from llama_jax import tree

_BRANCH = "auxiliary"


def joined(trained: tree.Tree, auxiliary: tree.Tree) -> tree.Tree:
    """One tree of both; of a model that has none beside it, its own."""
    return {**trained, _BRANCH: auxiliary} if auxiliary else trained


def filled(like: tree.Tree, auxiliary: tree.Tree, value: Any) -> tree.Tree:
    """`like`, a tree over the model, with `value` for every auxiliary array."""
    return joined(like, jax.tree.map(lambda _: value, auxiliary))


def parted(both: tree.Tree) -> tuple[tree.Tree, tree.Tree]:
    """The inverse of `joined`."""
    rest = {name: branch for name, branch in both.items() if name != _BRANCH}
    return rest, both.get(_BRANCH, {})
