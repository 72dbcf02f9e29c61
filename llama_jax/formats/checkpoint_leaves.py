"""What a checkpoint's description says of weight leaves: types, static fields and parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from qwix import QArray

from llama_jax import tree
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.quantized import Float8Tensor, IntegerTensor, PackedScale, PackedTensor
from llama_jax.weights.tensors import QatTensor

_LEAF_TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        Float8Tensor,
        IntegerTensor,
        LoraTensor,
        SavedTensor,
        PackedTensor,
        PackedScale,
        QatTensor,
        QArray,
    )
}
# The groups of arrays that parameters may lie in.
PARAMETER_GROUPS = ("weights", "trained", "frozen")


def describe(leaf: Any) -> Any:
    """A JSON description of a weight leaf without its arrays: "array", None for an absent part,
    or the type with its static fields and parts."""
    if leaf is None:
        return None
    if type(leaf).__name__ not in _LEAF_TYPES:
        return "array"
    static, parts = {}, {}
    for spec in dataclasses.fields(leaf):
        value = getattr(leaf, spec.name)
        if not _is_static(spec):
            parts[spec.name] = describe(value)
        elif isinstance(leaf, QArray):
            static[spec.name] = str(jnp.dtype(value))
        else:
            static[spec.name] = value
    return {"type": type(leaf).__name__, "static": static, "parts": parts}


def _is_static(spec: dataclasses.Field[Any]) -> bool:
    return bool(spec.metadata.get("static")) or spec.metadata.get("pytree_node") is False


def build(description: Any, path: str, arrays: Mapping[str, Any]) -> Any:
    """The leaf that `describe` described, around `arrays`."""
    if description is None:
        return None
    if description == "array":
        return arrays[path]
    parts = {
        name: build(part, f"{path}.{name}", arrays) for name, part in description["parts"].items()
    }
    static = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["static"].items()
    }
    if description["type"] == "QArray":
        static["qtype"] = jnp.dtype(static["qtype"])
    return _LEAF_TYPES[description["type"]](**parts, **static)


def abstract_params(manifest: Mapping[str, Any]) -> tree.Tree:
    structs = {
        path: jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
        for group in PARAMETER_GROUPS
        for path, entry in manifest["groups"].get(group, {}).items()
    }
    leaves = manifest["leaves"].items()
    return tree.unflatten({path: build(leaf, path, structs) for path, leaf in leaves})
