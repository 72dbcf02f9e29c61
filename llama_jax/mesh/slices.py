"""TPU slices as users name them: what they hold, how fast they are, and their devices without them.

A slice is an accelerator generation and a number of **chips**: `v5e-16`, `v5p-64`, `2xv5e-256` for
two slices joined by the data-centre network. Google Cloud counts TensorCores for v4 and v5p, so its
type `v5p-128` has 64 chips; written with its prefix, `cloud:v5p-128`, it is read Cloud's way. Types
that name a generation differently, `v5litepod-16`, need no prefix.

The TPU compiler runs on any machine where libtpu is installed, so a program can be compiled for a
slice that is not there.
"""

import difflib
import math
import os
import re
from dataclasses import dataclass
from typing import Any

# Shapes by number of chips; those of the 3-D generations are whole parts of 4 x 4 x 4 cubes.
_GRIDS_2D: dict[int, tuple[int, ...]] = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
_GRIDS_3D: dict[int, tuple[int, ...]] = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
}


@dataclass(frozen=True)
class Generation:
    """A TPU generation. Rates are the published peaks of a chip (cloud.google.com/tpu/docs, 2026);
    `hbm_bytes` is what the compiler of libtpu 0.0.42 grants a device, read off its refusals.

    device_kind: what JAX calls its devices. devices_per_chip: how many it shows of one.
    peak_flops: bfloat16 operations a second. hbm_bandwidth and ici_bandwidth: bytes a second; the
    latter over all links in one direction. dcn_bandwidth: bytes a second that leave a chip over the
    data-centre network. cloud_prefix and counts_cores: how Cloud names accelerator types.
    gke_accelerator: the node selector's value. chip_config: what tells the compiler that the two
    cores of a v4 chip are one device, as they are when they run.
    """

    name: str
    device_kind: str
    devices_per_chip: int
    hbm_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    grids: dict[int, tuple[int, ...]]
    cloud_prefix: str
    counts_cores: bool
    gke_accelerator: str
    chip_config: str | None = None


def _gib(value: float) -> int:
    return round(value * 2**30)


GENERATIONS: dict[str, Generation] = {
    generation.name: generation
    for generation in (
        Generation(
            "v4", "TPU v4", 1, _gib(30.75), 275e12, 1228e9, 300e9, 6.25e9,
            _GRIDS_3D, "v4", True, "tpu-v4-podslice", "megacore",
        ),
        Generation(
            "v5e", "TPU v5 lite", 1, _gib(15.75), 197e12, 819e9, 200e9, 3.125e9,
            _GRIDS_2D, "v5litepod", False, "tpu-v5-lite-podslice",
        ),
        Generation(
            "v5p", "TPU v5", 1, _gib(95.74), 459e12, 2765e9, 600e9, 6.25e9,
            _GRIDS_3D, "v5p", True, "tpu-v5p-slice",
        ),
        Generation(
            "v6e", "TPU v6 lite", 1, _gib(31.25), 918e12, 1638e9, 400e9, 12.5e9,
            _GRIDS_2D, "v6e", False, "tpu-v6e-slice",
        ),
        Generation(
            "tpu7x", "TPU7x", 2, _gib(94.75), 2307e12, 7380e9, 600e9, 12.5e9,
            _GRIDS_3D, "tpu7x", False, "tpu7x",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """`count` slices of `chips` chips each, laid out as `topology`."""

    generation: Generation
    chips: int
    count: int = 1

    @property
    def name(self) -> str:
        one = f"{self.generation.name}-{self.chips}"
        return one if self.count == 1 else f"{self.count}x{one}"

    @property
    def topology(self) -> tuple[int, ...]:
        return self.generation.grids[self.chips]

    @property
    def total_chips(self) -> int:
        return self.count * self.chips

    @property
    def num_devices(self) -> int:
        """What JAX counts: a tpu7x chip is two devices."""
        return self.total_chips * self.generation.devices_per_chip

    @property
    def chips_per_host(self) -> int:
        """Hosts hold four chips; the 2-D generations also come as one host with one or eight."""
        return self.chips if len(self.topology) == 2 and self.chips <= 8 else min(4, self.chips)

    @property
    def hosts(self) -> int:
        """Of one slice."""
        return self.chips // self.chips_per_host

    @property
    def cloud_accelerator_type(self) -> str:
        """What `gcloud` calls one slice."""
        cores = 2 if self.generation.counts_cores else 1
        return f"{self.generation.cloud_prefix}-{self.chips * cores}"

    @property
    def hbm_bytes_per_chip(self) -> int:
        """What the compiler grants."""
        return self.generation.hbm_bytes * self.generation.devices_per_chip

    def describe(self) -> str:
        """For people: `v5p-64: 64 chips, 4x4x4, Cloud's v5p-128`."""
        shape = "x".join(map(str, self.topology))
        times = "" if self.count == 1 else f"{self.count} slices of "
        return f"{self.name}: {times}{self.chips} chips, {shape}, Cloud's " + (
            self.cloud_accelerator_type
        )


def slice_named(text: str) -> Slice:
    """Reads `v5e-16`, `2xv5e-16`, `v5litepod-16` or `cloud:v5p-128` (Cloud's count of cores).

    Raises ValueError saying what is allowed.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(cloud:)?([a-z0-9]+)-(\d+)", text)
    if match is None:
        raise ValueError(
            f"slice {text!r} is unknown; write generation-chips, such as v5e-16, or 2xv5e-16 for "
            f"two slices"
        )
    count, is_cloud, prefix, number = match.groups()
    cloud_names = {generation.cloud_prefix: generation for generation in GENERATIONS.values()}
    generation = (cloud_names if is_cloud else GENERATIONS | cloud_names).get(prefix)
    if generation is None and is_cloud:
        raise ValueError(
            f"slice {text!r} is unknown: Cloud's names begin with {', '.join(cloud_names)}; by "
            f"chips it would be {text.removeprefix('cloud:')}"
        )
    if generation is None:
        near = difflib.get_close_matches(prefix, GENERATIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"slice {text!r} is unknown: there is no generation {prefix}{hint} (generations: "
            f"{', '.join(GENERATIONS)}; write generation-chips, such as v5e-16)"
        )
    cores = 2 if is_cloud and generation.counts_cores else 1
    chips, rest = divmod(int(number), cores)
    if rest or chips not in generation.grids:
        sizes = ", ".join(str(size * cores) for size in generation.grids)
        what = "cores" if cores > 1 else "chips"
        raise ValueError(
            f"slice {text!r}: there is no {generation.name} slice of {number} {what} here; sizes "
            f"are {sizes}"
        )
    if count == "0":
        raise ValueError(f"slice {text!r} has no slices; write 2x{prefix}-{number} for two")
    return Slice(generation, chips, int(count or 1))


def peak_flops(device_kind: str) -> float | None:
    """Published peak of bfloat16 operations a second of one device, None where it is not known."""
    for generation in GENERATIONS.values():
        if device_kind in (generation.device_kind, f"TPU {generation.name}"):
            return generation.peak_flops / generation.devices_per_chip
    # Dense bfloat16, from the makers' data sheets.
    gpus = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
    return next((peak for name, peak in gpus.items() if name in device_kind), None)


def slice_devices(wanted: str | Slice) -> list[Any]:
    """The devices of a slice, to build a mesh from and compile for.

    Raises ValueError for a slice that is unknown, and RuntimeError where libtpu is missing.
    """
    if isinstance(wanted, str):
        wanted = slice_named(wanted)
    # Read by libtpu when it starts: without the first it asks a metadata server that is not there,
    # without the second two processes cannot compile at the same time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    shape = "x".join(map(str, wanted.topology))
    options: dict[str, Any] = {}
    if wanted.count > 1:
        options["num_slices"] = wanted.count
    if wanted.generation.chip_config is not None:
        options["chip_config_name"] = wanted.generation.chip_config
    if math.prod(wanted.topology) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{wanted.generation.name}:{shape}", **options
    )
    return list(topology.devices)
