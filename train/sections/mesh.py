"""The key `mesh` of a run config."""

from dataclasses import dataclass

from llama_jax.config import MESH_AXES
from llama_jax.mesh.slices import slice_named
from train.typed import Section, option


@dataclass(frozen=True)
class MeshSection(Section):
    """How many devices each mesh axis has; one may be -1, whatever is left."""

    data: int = option("copies of the parameters, rows split", default=1, low=-1)
    fsdp: int = option("parameters and rows split", default=-1, low=-1)
    tensor: int = option("heads, mlp and vocabulary split", default=1, low=-1)
    context: int = option("tokens of a row, and parameters, split", default=1, low=-1)
    expert: int = option("experts and rows split", default=1, low=-1)
    cpu_devices: int | None = option(
        "emulate this many devices on the CPU; null: the devices that are there",
        default=None,
        low=1,
        high=4096,
    )
    slice: str | None = option(
        "the TPU slice this run is made for, such as v5e-16, by number of chips: what `fit` proves "
        "and `launch` brings up; on another number of TPU devices `train` refuses to start",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slice is not None:
            slice_named(self.slice)
            if self.cpu_devices is not None:
                raise ValueError("mesh.slice and mesh.cpu_devices both say where to run; keep one")
        for axis, size in self.sizes().items():
            if size == 0:
                raise ValueError(f"mesh.{axis} is 0; it must be a positive integer or -1")
        free = [axis for axis, size in self.sizes().items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"mesh axes {' and '.join(free)} are both -1; only one may be")

    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in MESH_AXES}
