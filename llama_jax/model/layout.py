"""Two layouts of the same parameters: stacked layers, and layers made for decoding.

A scan over stacked weights copies each layer's slice before using it, which costs decoding on a
CPU a factor of 2.6. An array for each layer avoids that, and its matrices become leaves that `dot`
multiplies fastest with few rows.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from llama_jax import tree
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.tensors import DecodingTensor


def unstack_layers(params: tree.Tree) -> tree.Tree:
    """The same parameters with `layers` as a tuple of per-layer trees; names stay.

    On a single CPU device the arrays lie in the memory of the stacked ones, which they keep; else
    they are copies.
    """
    layers = params["layers"]
    if not isinstance(layers, dict):
        raise ValueError("the layers of these parameters are not stacked; they were split before")
    leaves, structure = jax.tree.flatten(layers)
    count = leaves[0].shape[0]
    if all(map(_is_on_one_cpu, leaves)):
        each = zip(*map(_views, leaves), strict=True)
        return {**params, "layers": tuple(jax.tree.unflatten(structure, one) for one in each)}
    # One compilation for all layers: the index is an argument.
    take = jax.jit(_take)
    return {**params, "layers": tuple(take(layers, index) for index in range(count))}


def for_decoding(params: tree.Tree) -> tree.Tree:
    """`unstack_layers` with matrices, also what lies under adapters, and the head, or the embedding
    that serves as one, made for few rows; experts stay.

    The result runs in `hidden_states` and `decode` like any parameters, but no longer follows the
    weight table.
    """
    apart = unstack_layers(params)
    layers = tuple(tree.map_with_path(_for_few_rows, layer) for layer in apart["layers"])
    head = "lm_head" if "lm_head" in params else "embed_tokens"
    made = {"weight": _for_few_rows(head, params[head]["weight"])}
    return {**apart, "layers": layers, head: made}


def summing_alike(params: tree.Tree, *, rows: int) -> tree.Tree:
    """The same with the bits of products independent of the number of rows up to `rows`:
    `DecodingTensor`."""

    def alike(leaf: Any) -> Any:
        if isinstance(leaf, DecodingTensor):
            return dataclasses.replace(leaf, alike_rows=rows)
        return leaf

    return jax.tree.map(alike, params, is_leaf=lambda leaf: isinstance(leaf, DecodingTensor))


def _is_on_one_cpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    devices = leaf.devices()
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def _views(stacked: jax.Array) -> list[jax.Array]:
    # A CPU's device memory is the host's: what is aligned as XLA wants it is taken as it is.
    (device,) = stacked.devices()
    return jax.device_put(list(np.asarray(stacked)), device if stacked.committed else None)


def _take(layers: tree.Tree, index: jax.Array) -> tree.Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), layers)


def _for_few_rows(path: str, leaf: Any) -> Any:
    """Matrices of linear layers; experts go through another product and stay."""
    if isinstance(leaf, LoraTensor):
        return dataclasses.replace(leaf, base=_for_few_rows(path, leaf.base))
    is_matrix = isinstance(leaf, jax.Array) or is_quantized(leaf)
    if is_matrix and leaf.ndim == 2 and "block_sparse_moe" not in path:
        return DecodingTensor(leaf)
    return leaf
