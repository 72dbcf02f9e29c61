"""How a model that is served lies on a mesh.

Every device has a part of every matrix and of every head's keys and values, and all rows. `tensor`
divides query and key/value heads alike; where there are more devices than key/value heads, `fsdp`
divides further what `tensor` does, while devices that share a key/value head hold it each. `data`
is the number of copies of all this, each on devices of its own and with an engine of its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from infer.engine.options import EngineOptions
from llama_jax.config import LogicalRules, ModelConfig
from llama_jax.kernels.paged import check_heads
from llama_jax.mesh.sharding import make_mesh, validate
from llama_jax.mesh.slices import slice_named

RULES: LogicalRules = (
    ("batch", None),
    ("length", None),
    ("embed", None),
    ("expert_embed", None),
    ("heads", ("tensor", "fsdp")),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", ("tensor", "fsdp")),
    ("experts", "expert"),
    ("vocab", ("tensor", "fsdp")),
    ("layers", None),
    ("rank", None),
)


def serving_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Of one copy of a model: see `serving_meshes`. Raises ValueError where there are more."""
    (mesh,) = serving_meshes(sizes, devices)
    return mesh


def serving_meshes(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> list[Mesh]:
    """A mesh for each of the `data` copies of a model, over as many devices as the other sizes say,
    of those that are here. Raises ValueError."""
    devices = jax.devices() if devices is None else devices
    own = {axis: size for axis, size in sizes.items() if axis != "data"}
    count, copies = math.prod(own.values()), sizes.get("data", 1)
    if count * copies > len(devices):
        raise ValueError(
            f"mesh {dict(sizes)} needs {count * copies} devices, but there are {len(devices)}"
        )
    return [
        make_mesh(own, devices=devices[place * count : (place + 1) * count])
        for place in range(copies)
    ]


def check(config: ModelConfig, mesh: Mesh) -> int:
    """Over how many devices key/value heads are dealt out. Raises ValueError where the mesh does
    not divide the model."""
    validate(config, mesh, RULES)
    return check_heads(config.num_attention_heads, config.num_key_value_heads, mesh, RULES)


def first_device(mesh: Mesh | None) -> jax.Device:
    """Of those of the mesh that this process has, or the one that JAX computes on without."""
    return jax.local_devices()[0] if mesh is None else mesh.local_devices[0]


def draft_mesh(mesh: Mesh | None) -> Mesh | None:
    """Where a draft model lies beside a model on `mesh`: on all its devices, or, where these belong
    to several processes, on one of this process. Only process 0 guesses, and tells the others."""
    if mesh is None or not mesh.is_multi_process:
        return mesh
    return serving_mesh({}, [first_device(mesh)])


def has_kernel(mesh: Mesh | None) -> bool:
    """Whether the devices are TPUs, for which there is a kernel that reads pages."""
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    return bool(device.platform == "tpu")


def uses_pages(options: EngineOptions, mesh: Mesh | None) -> bool:
    """Raises ValueError for options that a mesh cannot have."""
    if mesh is not None and options.cache == "slots":
        raise ValueError("cache is slots, which lie on one device; leave cache or mesh out")
    if options.cache is not None:
        return options.cache == "pages"
    return mesh is not None or has_kernel(None)


def check_slice(name: str) -> None:
    """Raises ValueError where the devices are not those of a slice, or some of its hosts are not
    here."""
    wanted = slice_named(name)
    hosts = wanted.hosts * wanted.count
    if jax.process_count() != hosts:
        raise ValueError(
            f"slice {name} has {hosts} hosts, but this server runs on {jax.process_count()}; start "
            f"it on every host of the slice, or leave slice out to start anyway"
        )
    kind, found = jax.devices()[0].device_kind, len(jax.devices())
    if kind != wanted.generation.device_kind or found != wanted.num_devices:
        raise ValueError(
            f"the settings are for {wanted.describe()}, but here are {found} of {kind}; leave "
            f"slice out to start anyway"
        )


def check_processes(sizes: Mapping[str, int] | None, options: EngineOptions) -> None:
    """Raises ValueError for what an engine of several processes cannot have."""
    count = jax.process_count()
    if count == 1:
        return
    if sizes is None:
        raise ValueError(
            f"{count} processes serve one model together: say how it is divided over their "
            f"{len(jax.devices())} devices, such as mesh tensor={len(jax.devices())}"
        )
    if sizes.get("data", 1) > 1:
        raise ValueError(
            f"mesh has data={sizes['data']}, but {count} processes serve one copy of a model; "
            f"start a group of processes for each copy"
        )
    if math.prod(sizes.values()) != len(jax.devices()):
        raise ValueError(
            f"mesh {dict(sizes)} takes {math.prod(sizes.values())} devices, but {count} processes "
            f"have {len(jax.devices())}, of which none may be left out"
        )
    if options.cache == "slots":
        raise ValueError("cache is slots, which lie on one device; leave it out")
