"""What a training step turns into its successor, and where it lies on the mesh."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llama_jax import tree
from llama_jax.config import LogicalRules, ModelConfig
from llama_jax.mesh.sharding import replicated, shardings
from train.auxiliary import joined
from train.optim import Optimizer, OptimizerState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: [] int32, batches seen, skipped ones included; params: the whole tree, frozen arrays
    too; opt_state: of the trained arrays alone; rng: the key of the run, into which anything random
    in a step folds the step's number, so that a resumed run draws what the first one would have;
    auxiliary: weights trained beside the model, see `train.auxiliary`.
    """

    step: Any
    params: tree.Tree
    opt_state: OptimizerState
    rng: Any
    auxiliary: tree.Tree = field(default_factory=dict)


def init_state(
    params: tree.Tree,
    *,
    mask: tree.Tree,
    optimizer: Optimizer,
    rng: jax.Array,
    auxiliary: tree.Tree | None = None,
) -> TrainState:
    """The state before the first step. Works on shape structs under `jax.eval_shape`."""
    trained, _ = tree.partition(params, mask)
    beside = auxiliary or {}
    moments = optimizer.init(joined(trained, beside))
    return TrainState(jnp.zeros((), jnp.int32), params, moments, rng, beside)


def state_shardings(
    config: ModelConfig, state: TrainState, mesh: Mesh, rules: LogicalRules
) -> TrainState:
    """A sharding for every array of `state` (arrays or shape structs), all on the devices.

    Moments lie where their parameters do: they carry the path of the parameter at the end of their
    own. What has another shape, such as counters and factored moments, is replicated.
    """
    params = shardings(config, state.params, mesh, rules)
    places = tree.flatten_arrays(params)
    shapes = {path: array.shape for path, array in tree.flatten_arrays(state.params).items()}
    everywhere = replicated(mesh)

    def place(path: str, array: Any) -> Any:
        parts = path.split(".")
        for start in range(len(parts)):
            name = ".".join(parts[start:])
            if name in places and shapes[name] == array.shape:
                return places[name]
        return everywhere

    return TrainState(
        step=everywhere,
        params=params,
        opt_state=tree.map_arrays_with_path(place, state.opt_state),
        rng=everywhere,
        auxiliary=jax.tree.map(lambda _: everywhere, state.auxiliary),
    )


def on_host(state: TrainState, places: TrainState) -> TrainState:
    """`places` with the moments in the host's memory; numbers such as the count stay."""

    def moved(array: Any, place: NamedSharding) -> NamedSharding:
        return place.with_memory_kind("pinned_host") if array.ndim else place

    moments = jax.tree.map(moved, state.opt_state, places.opt_state)
    return dataclasses.replace(places, opt_state=moments)


class Offload(NamedTuple):
    """Where moments lie between steps (`resting`) and while they are updated (`working`)."""

    working: Any
    resting: Any

    def fetch(self, moments: Any, gradients: Any) -> tuple[Any, Any]:
        """(moments at `working`, gradients), the first not before the second are there: until then
        their room is needed for what the backward pass reads."""
        moments, gradients = jax.lax.optimization_barrier((moments, gradients))
        return jax.device_put(moments, self.working), gradients

    def put_back(self, moments: Any) -> Any:
        return jax.device_put(moments, self.resting)
