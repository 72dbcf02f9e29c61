"""What a run ran on, for its report: devices, processes, versions."""

import functools
import platform
from collections import Counter
from importlib import metadata

import jax
from jax.sharding import Mesh

from llama_jax import __version__

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "qwix")


def describe(mesh: Mesh) -> dict[str, str]:
    """Name -> what is there; packages that are not installed are left out."""
    kinds = Counter(device.device_kind for device in mesh.devices.flat)
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    facts = {
        "devices": ", ".join(f"{count} × {kind}" for kind, count in kinds.items()),
        "mesh": axes or "one device",
        "processes": str(jax.process_count()),
        "llama-jax": __version__,
        "Python": platform.python_version(),
    }
    return {**facts, **_versions()}


@functools.cache
def _versions() -> dict[str, str]:
    """Looked up once: a report is written with every checkpoint, and its files are many."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
