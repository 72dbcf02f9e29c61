"""Whether layers run scanned or unrolled, and the per-layer arrays for the second."""

import weakref
from typing import Any, Literal

import jax

from llama_jax.model.layout import for_decoding, head_for_decoding

Layers = Literal["auto", "unrolled", "scanned"]

# The last unrolled layers, so that calling `generate` again does not copy the model again. The
# stacked arrays are held weakly: when they go, the entry does.
_recent: dict[tuple[int, ...], tuple[list[weakref.ref[jax.Array]], Any]] = {}


def with_layers(params: Any, layers: Layers, mesh: jax.sharding.Mesh | None) -> Any:
    """`params` in the form that `layers` asks for; `auto` unrolls on a single CPU device.

    Layers that are a tuple already stay so: they cannot be scanned.
    """
    if layers not in ("auto", "unrolled", "scanned"):
        raise ValueError(f"layers is {layers!r}; allowed are auto, unrolled, scanned")
    is_unrolled = isinstance(params["layers"], tuple | list)
    if is_unrolled:
        if layers == "scanned":
            raise ValueError("layers is 'scanned', but params hold a tuple of layers; stack them")
        return params
    if layers == "unrolled" or (layers == "auto" and mesh is None and _on_one_cpu(params)):
        return {**head_for_decoding(params), "layers": _unrolled(params)}
    return params


def _on_one_cpu(params: Any) -> bool:
    devices = {device for leaf in jax.tree.leaves(params) for device in _devices(leaf)}
    return len(devices) <= 1 and all(device.platform == "cpu" for device in devices)


def _devices(leaf: Any) -> set[Any]:
    if isinstance(leaf, jax.Array):
        return leaf.devices()
    return {jax.devices()[0]}  # a host array goes to the default device


def _unrolled(params: Any) -> Any:
    leaves = jax.tree.leaves(params["layers"])
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return for_decoding(params)["layers"]  # host arrays may change under us
    key = tuple(map(id, leaves))
    if key in _recent:
        held, unrolled = _recent[key]
        # An id may be in use again after its array is gone.
        if all(ref() is leaf for ref, leaf in zip(held, leaves, strict=True)):
            return unrolled
    unrolled = for_decoding(params)["layers"]
    _recent.clear()
    held = [weakref.ref(leaf, lambda _: _recent.pop(key, None)) for leaf in leaves]
    _recent[key] = (held, unrolled)
    return unrolled
