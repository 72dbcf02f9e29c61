"""TPU slices as users name them, and their devices without the hardware.

A slice is an accelerator generation and a number of chips: `v5e-16`. The TPU compiler runs on any
machine where libtpu is installed, so a program can be compiled for a slice that is not there.
"""

import os
from typing import Any

# Generation -> the name libtpu knows it by, the slice shapes it accepts by number of chips, and the
# bytes its compiler grants a device. Read off libtpu 0.0.42; sizes are chips, not cores.
_GRIDS_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TOPOLOGIES = {"v5e": ("v5e", _GRIDS_2D), "v6e": ("v6e", _GRIDS_2D)}


def slice_devices(name: str) -> list[Any]:
    """The devices of a slice such as `v5e-16`, to build a mesh from and compile for.

    Raises ValueError for a slice that is unknown, and RuntimeError where libtpu is missing.
    """
    generation, _, chips = name.partition("-")
    if generation not in _TOPOLOGIES or not chips.isdigit():
        raise ValueError(f"slice {name!r} is unknown; write generation-chips, such as v5e-16")
    kind, shapes = _TOPOLOGIES[generation]
    if int(chips) not in shapes:
        sizes = ", ".join(map(str, shapes))
        raise ValueError(f"there is no {generation} slice of {chips} chips here; sizes are {sizes}")
    # Read by libtpu when it starts: without the first it asks a metadata server that is not there,
    # without the second two processes cannot compile at the same time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{shapes[int(chips)]}"
    )
    return list(topology.devices)
