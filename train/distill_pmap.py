"""The teacher-student step as a `jax.pmap`: data parallel, teacher and student on every device.

The only use of pmap. The function inside is that of the sharded step, with the sums over devices
written out; the numbers are the same. Each device gets its rows of the batch, whole copies of both
models, and the gradients of all. It runs in one process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ModelConfig

AXIS = "data"
_NO_MESH = Mesh(np.empty((), dtype=object), ())


@dataclass(frozen=True)
class PmapStep:
    """`step(state, batch, *beside)` like the jitted step's: whole arrays go in, [B, T] for the
    batch, and come out replicated."""

    mapped: Any
    num_devices: int

    def __call__(self, state: Any, batch: Any, *beside: Any) -> Any:
        with jax.set_mesh(_NO_MESH):  # pmap brings its own, and refuses to run inside another
            return self.mapped(state, self._dealt(batch), *beside)

    def lower(self, state: Any, batch: Any, *beside: Any) -> "Lowered":
        with jax.set_mesh(_NO_MESH):
            return Lowered(self, self.mapped.lower(state, self._dealt(batch), *beside))

    def _dealt(self, batch: Any) -> Any:
        """[B, T] -> [devices, B / devices, T], rows in succession together."""

        def deal(array: Any) -> Any:
            shape = (self.num_devices, array.shape[0] // self.num_devices, *array.shape[1:])
            if isinstance(array, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(shape, array.dtype)
            return array.reshape(shape)

        return jax.tree.map(deal, batch)


@dataclass(frozen=True)
class Lowered:
    """The lowered program; `compile` gives what runs it."""

    step: PmapStep
    lowered: Any

    def as_text(self) -> str:
        return self.lowered.as_text()

    def compile(self) -> Callable[..., Any]:
        return self.step


def make_pmap_step(
    step: Callable[..., Any], config: ModelConfig, mesh: Mesh, *, num_beside: int
) -> PmapStep:
    """`step` is made with `axis=AXIS`; it sums over devices what must be summed.

    Raises ValueError for experts, whose balancing loss is of the whole batch and no sum over
    devices, and for several processes.
    """
    if config.moe is not None:
        raise ValueError(
            "distill.step is pmap, but the student has experts, which are balanced over the whole "
            "batch and not device by device; choose distill.step: jit"
        )
    if jax.process_count() > 1:
        raise ValueError("distill.step is pmap, which runs in one process; choose jit for several")
    devices = list(mesh.devices.flat)

    def alone(*arguments: Any) -> Any:
        # On its own device each is without a mesh: nothing is to be placed.
        with jax.sharding.use_abstract_mesh(_NO_MESH.abstract_mesh):
            return step(*arguments)

    mapped = jax.pmap(
        alone,
        axis_name=AXIS,
        in_axes=(None, 0, *[None] * num_beside),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )
    return PmapStep(mapped, len(devices))
