"""Quantization-aware training as a change of the tree: weights wrapped before, integers after."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from qwix import QArray

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.qat import Backward, codes
from llama_jax.weights.quantize import Quantization
from llama_jax.weights.quantized import IntegerTensor, PackedTensor, pack_nibbles
from llama_jax.weights.tensors import QatTensor


def add_qat(
    config: ModelConfig,
    params: tree.Tree,
    *,
    bits: int,
    backward: Backward,
    skip: Sequence[str] | None,
) -> tree.Tree:
    """The parameters with matrices as `QatTensor`s, which are rounded in every product.

    skip: as in `Quantization`. Raises ValueError for weights that are quantized or adapted, and
    for experts.
    """
    how = Quantization(f"int{bits}-dynamic", skip=None if skip is None else tuple(skip))
    chosen = how.chosen(config, params)

    def wrapped(path: str, leaf: Leaf) -> Leaf:
        return QatTensor(leaf, bits, backward) if path in chosen else leaf

    return tree.map_with_path(wrapped, params)


def has_qat(params: tree.Tree) -> bool:
    leaves = tree.flatten(params).values()
    return any(isinstance(getattr(leaf, "base", leaf), QatTensor) for leaf in leaves)


def convert_qat(params: tree.Tree) -> tree.Tree:
    """The parameters with integers in place of every `QatTensor`, also under adapters: the same
    products without the rounding of weights.

    Raises ValueError where there is none.
    """
    if not has_qat(params):
        raise ValueError(
            "the model was not trained with method qat, so there is nothing to convert; choose a "
            "scheme that quantizes after training, such as int8-dynamic"
        )

    def converted(leaf: Leaf) -> Leaf:
        if isinstance(leaf, LoraTensor):
            return dataclasses.replace(leaf, base=converted(leaf.base))
        return _integers(leaf) if isinstance(leaf, QatTensor) else leaf

    return tree.map_with_path(lambda _, leaf: converted(leaf), params)


def _integers(leaf: QatTensor) -> IntegerTensor:
    one = partial(codes, bits=leaf.bits)
    values, scale = jax.jit(one if leaf.ndim == 2 else partial(jax.lax.map, one))(leaf.weight)
    base: Any = QArray(values, scale)
    if leaf.bits == 4:
        size = leaf.shape[-1]
        base = PackedTensor(pack_nibbles(values), scale, "int4", size, size)
    return IntegerTensor(base, None)
