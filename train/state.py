"""What a training step turns into its successor, and where it lies on the mesh."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

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
    """A sharding for every array of `state` (arrays or shape structs).

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
