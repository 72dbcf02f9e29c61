"""Whether layers run scanned or unrolled."""

from typing import Any, Literal

import jax

from llama_jax.model.layout import for_decoding

Layers = Literal["auto", "unrolled", "scanned"]


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
        return for_decoding(params)
    return params


def _on_one_cpu(params: Any) -> bool:
    devices = {device for leaf in jax.tree.leaves(params) for device in _devices(leaf)}
    return len(devices) <= 1 and all(device.platform == "cpu" for device in devices)


def _devices(leaf: Any) -> set[Any]:
    if isinstance(leaf, jax.Array):
        return leaf.devices()
    return {jax.devices()[0]}  # a host array goes to the default device
