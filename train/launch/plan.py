"""What a launch will do, decided and checked before anything is rented."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import AbstractMesh

from llama_jax.mesh.sharding import check_batch
from llama_jax.mesh.slices import Slice, slice_named
from train.config import RunConfig
from train.sections.mesh import MeshSection
from train.setup import rows_per_item

# The software each generation's VMs boot with (cloud.google.com/tpu/docs/runtimes). tpu7x is
# missing: Cloud offers it on GKE alone.
RUNTIME_VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# What Cloud accepts as the id of a queued resource and Kubernetes as the name of an object that
# names hosts; shorter, because both append numbers to it.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,46}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")


@dataclass(frozen=True)
class Target:
    """Which machines are meant: one queued resource of one project and zone.

    tunnel: reach them through Identity-Aware Proxy, for machines without a public address.
    """

    name: str
    project: str
    zone: str
    tunnel: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        if not _PROJECT.fullmatch(self.project):
            raise ValueError(
                f"--project {self.project!r} is not a project id (letters, digits and hyphens, 6 "
                f"to 30 of them); `gcloud projects list` shows yours"
            )
        if not _ZONE.fullmatch(self.zone):
            raise ValueError(
                f"--zone {self.zone!r} is not a zone such as us-west4-a; `gcloud compute tpus "
                f"locations list` shows them"
            )


@dataclass(frozen=True)
class Machines:
    """The slice to create. tier: how it is paid for. wait_seconds: how long to queue for it."""

    target: Target
    slice: Slice
    tier: str
    runtime_version: str
    wait_seconds: int
    service_account: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    internal_ips: bool = False

    def __post_init__(self) -> None:
        if self.tier not in ("on-demand", "spot", "reserved"):
            raise ValueError(f"tier {self.tier!r} is not on-demand, spot or reserved")
        if self.wait_seconds <= 0:
            raise ValueError(f"--wait must be more than 0 seconds, not {self.wait_seconds}")

    @property
    def num_workers(self) -> int:
        return self.slice.hosts * self.slice.count

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the TPU VMs, one a slice; Cloud numbers those it creates together."""
        name = self.target.name
        if self.slice.count == 1:
            return (name,)
        return tuple(f"{name}-{number}" for number in range(self.slice.count))


def runtime_version(wanted: Slice) -> str:
    """Raises ValueError for a generation that has no TPU VMs."""
    generation = wanted.generation.name
    if generation not in RUNTIME_VERSIONS:
        raise ValueError(
            f"{generation} is offered on GKE only, not as Cloud TPU VMs; launch with --gke"
        )
    return RUNTIME_VERSIONS[generation]


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--name {name!r} must be lower-case letters, digits and hyphens, begin with a letter, "
            f"end without a hyphen and have at most 48 characters"
        )


def default_name(config: Path) -> str:
    """`llama3.1-8b-full-v5e-16.yaml` -> `llama3-1-8b-full-v5e-16`.

    Raises ValueError where nothing usable is left.
    """
    name = re.sub(r"[^a-z0-9]+", "-", config.stem.lower()).strip("-")[:48].rstrip("-")
    if not _NAME.fullmatch(name):
        raise ValueError(f"no name can be made from {config.name}; give --name")
    return name


def to_seconds(text: str) -> int:
    """Of --wait: `90s`, `15m`, `6h`, `2d` -> seconds. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"--wait {text!r} is not a duration such as 90s, 15m, 6h or 2d")
    return int(match[1]) * _UNITS[match[2]]


def slice_of(run: RunConfig, named: str | None) -> Slice:
    """The slice that --slice names, by default the one the config is made for.

    Raises ValueError where neither says, and where they differ.
    """
    if named is None and run.mesh.slice is None:
        raise ValueError("--slice is missing, and mesh.slice is not set; say which, such as v5e-16")
    made_for = slice_named(run.mesh.slice) if run.mesh.slice is not None else None
    wanted = slice_named(named) if named is not None else made_for
    assert wanted is not None
    if made_for is not None and wanted != made_for:
        raise ValueError(
            f"--slice is {wanted.name}, but the config is made for {made_for.name}; override that "
            f"with mesh.slice={wanted.name}, and see with `llama-jax fit` whether it fits"
        )
    return wanted


def check_fits_slice(run: RunConfig, wanted: Slice) -> None:
    """Raises ValueError for a mesh that the slice's devices cannot form, and for a batch that the
    mesh cannot share, before they are paid."""
    if run.mesh.cpu_devices is not None:
        raise ValueError(
            f"mesh.cpu_devices is {run.mesh.cpu_devices}: this config emulates devices on a CPU. "
            f"Override it with mesh.cpu_devices=null, or take a config made for a TPU slice"
        )
    mesh = _formed(run.mesh, wanted.num_devices)
    if mesh is None:
        sizes = " × ".join(f"{axis} {size}" for axis, size in run.mesh.sizes().items())
        raise ValueError(
            f"the mesh ({sizes}) cannot be formed by the {wanted.num_devices} devices of "
            f"{wanted.name}; change mesh, or --slice"
        )
    rows = run.train.batch_size // run.train.gradient_accumulation_steps * rows_per_item(run)
    check_batch(rows, run.train.sequence_length, mesh, run.compute.rules)


def _formed(mesh: MeshSection, devices: int) -> AbstractMesh | None:
    """The mesh over so many devices, if they can form it."""
    sizes = mesh.sizes()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest, left = divmod(devices, fixed)
    if left or (rest != 1 and -1 not in sizes.values()):
        return None
    return AbstractMesh(
        tuple(rest if size == -1 else size for size in sizes.values()), tuple(sizes)
    )
