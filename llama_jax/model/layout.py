"""Two layouts of the same parameters: stacked layers, and layers made for decoding.

A scan over stacked weights copies each layer's slice before using it, which costs decoding on a
CPU a factor of 2.6. Separate arrays per layer avoid that, and while they are being made, products
of the same input are joined and matrices become leaves that `dot` multiplies fastest with few rows.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.weights.tensors import DecodingTensor, LoraTensor, is_quantized

_JOINED = {
    "qkv_proj": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "gate_up_proj": ("mlp", ("gate_proj", "up_proj")),
}


def unstack_layers(params: tree.Tree) -> tree.Tree:
    """The same parameters with `layers` as a tuple of per-layer trees; names stay."""
    return _per_layer(params, lambda layer: layer)


def for_decoding(params: tree.Tree) -> tree.Tree:
    """`unstack_layers` with matrices joined, and made, with the head, for few rows, also what lies
    under adapters; experts stay.

    The result runs in `hidden_states` and `decode` like any parameters, but no longer follows the
    weight table. It is a copy of all layers: drop the stacked ones if memory is short.
    """
    return head_for_decoding(_per_layer(params, _joined))


def head_for_decoding(params: tree.Tree) -> tree.Tree:
    """The parameters with the head, or the embedding that serves as one, made for few rows."""
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {**params, name: {"weight": _for_few_rows(name, params[name]["weight"])}}


def summing_alike(params: tree.Tree, *, rows: int) -> tree.Tree:
    """The same with the bits of products independent of the number of rows up to `rows`:
    `DecodingTensor`."""

    def alike(leaf: Any) -> Any:
        if isinstance(leaf, DecodingTensor):
            return dataclasses.replace(leaf, alike_rows=rows)
        return leaf

    return jax.tree.map(alike, params, is_leaf=lambda leaf: isinstance(leaf, DecodingTensor))


def _per_layer(params: tree.Tree, change: Any) -> tree.Tree:
    layers = params["layers"]
    if not isinstance(layers, dict):
        raise ValueError("the layers of these parameters are not stacked; they were split before")
    count = jax.tree.leaves(layers)[0].shape[0]
    # One compilation for all layers: the index is an argument.
    take = jax.jit(partial(_take, change))
    return {**params, "layers": tuple(take(layers, index) for index in range(count))}


def _take(change: Any, layers: tree.Tree, index: jax.Array) -> tree.Tree:
    return change(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), layers))


def _joined(layer: tree.Tree) -> tree.Tree:
    layer = {name: dict(part) for name, part in layer.items()}
    for joined, (block, names) in _JOINED.items():
        parts = [layer[block][name] for name in names] if block in layer else []
        if parts and _are_of_one_kind([part["weight"] for part in parts]):
            for name in names:
                del layer[block][name]
            layer[block][joined] = jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
    return tree.map_with_path(_for_few_rows, layer)


def _are_of_one_kind(weights: list[Any]) -> bool:
    """Whether these are matrices of which every array has a row for each output: not so adapters,
    and quantized ones with one scale for all activations."""
    kinds = {jax.tree.structure(weight) for weight in weights}
    return len(kinds) == 1 and all(
        (isinstance(weight, jax.Array) or is_quantized(weight))
        and all(array.shape[:1] == weight.shape[:1] for array in jax.tree.leaves(weight))
        for weight in weights
    )


def _for_few_rows(path: str, leaf: Any) -> Any:
    """Matrices of linear layers; experts go through another product and stay."""
    if isinstance(leaf, LoraTensor):
        return dataclasses.replace(leaf, base=_for_few_rows(path, leaf.base))
    is_matrix = isinstance(leaf, jax.Array) or is_quantized(leaf)
    if is_matrix and leaf.ndim == 2 and "block_sparse_moe" not in path:
        return DecodingTensor(leaf)
    return leaf
