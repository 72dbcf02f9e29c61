"""How far a merge takes weights from those that were trained, and what it is merged onto.

An adapter trained on a quantized base belongs to the dequantized base: `to_array` merges onto that.
Onto the weights from before quantization it goes only when asked for, by `rebased`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.weights.adapted import is_adapted
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.tensors import to_array


def rebased(params: tree.Tree, original: tree.Tree) -> tree.Tree:
    """`original` with the adapters of `params` on it.

    Raises ValueError when there is nothing of the two, when the trees differ in paths or shapes,
    and when `original` is itself quantized or adapted.
    """
    others = tree.flatten(original)
    leaves = tree.flatten(params)
    if not any(is_adapted(leaf) or is_quantized(leaf) for leaf in leaves.values()):
        raise ValueError(
            "the model holds neither an adapter nor quantized weights, so there is nothing to "
            "merge onto another one (--onto); leave that out"
        )
    if set(others) != set(leaves):
        odd = sorted(set(others) ^ set(leaves))
        raise ValueError(f"the models differ in {', '.join(odd[:5])}; merge onto the same model")
    for path, leaf in leaves.items():
        other = others[path]
        if is_quantized(other) or is_adapted(other):
            raise ValueError(f"{path} is quantized or adapted in the model to merge onto as well")
        if tuple(other.shape) != tuple(leaf.shape):
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)}, but {tuple(other.shape)} in the model to "
                f"merge onto"
            )

    def moved(path: str, leaf: Leaf) -> Leaf:
        if is_adapted(leaf):
            return dataclasses.replace(leaf, base=moved(path, leaf.base))
        return others[path]

    return tree.map_with_path(moved, params)


def drift(params: tree.Tree, written: tree.Tree, *, dtype: Any) -> float:
    """The root mean square of what separates the full matrices of `written`, rounded to `dtype`,
    from those of `params`, relative to the latter; over adapted and quantized weights alone, 0.0
    where there are none."""
    others = tree.flatten(written)
    error = size = 0.0
    for path, leaf in tree.flatten(params).items():
        if not (is_adapted(leaf) or is_quantized(leaf)):
            continue
        sums = _sums(leaf, others[path], jnp.dtype(dtype))
        error, size = error + float(sums[0]), size + float(sums[1])
    return (error / size) ** 0.5 if size else 0.0


def _sums(leaf: Leaf, written: Leaf, dtype: Any) -> jax.Array:
    """(sum of squared differences, sum of squares), one layer at a time."""
    kept = jnp.finfo(dtype)

    def one(pair: tuple[Leaf, Leaf]) -> jax.Array:
        exact = to_array(pair[0])
        # A cast and its way back are one program, of which XLA would keep neither.
        rounded = jax.lax.reduce_precision(to_array(pair[1]), kept.nexp, kept.nmant)
        return jnp.stack([jnp.square(rounded - exact).sum(), jnp.square(exact).sum()])

    if leaf.ndim < 3:
        return jax.jit(one)((leaf, written))
    return jax.jit(lambda pair: jax.lax.map(one, pair).sum(axis=0))((leaf, written))
