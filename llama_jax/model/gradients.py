"""What the backward pass keeps, and in which order it makes what it returns.

The TPU compiler orders a program itself, and holds many an array longer than a step needs it.
Nothing here changes a number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import Compute

_INPUT = "layer_input"  # what `remat: offload` sends to the host

Function = Callable[[jax.Array, jax.Array], jax.Array]


def in_turn(function: Function) -> Function:
    """`function(x, weight)`, whose gradient of x is there only when that of a trained weight is.

    Else the weight's may wait until the end of the layer, or after the last layer until that of all
    of them, and what it is made of with it; on many chips whole and in float32, where its sum over
    the chips is dealt out. It pays where much is computed from the gradient of x.
    """

    @jax.custom_vjp
    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        return function(x, weight)

    def forward(x: Any, weight: Any) -> Any:
        if weight.perturbed:
            return jax.vjp(function, x.value, weight.value)
        return jax.vjp(lambda x: function(x, weight.value), x.value)

    def backward(pull: Any, gradient: jax.Array) -> Any:
        of_x, *of_weight = pull(gradient)
        return jax.lax.optimization_barrier((of_x, *of_weight)) if of_weight else (of_x, None)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: jax.Array, up: jax.Array, apart: bool = False) -> jax.Array:
    """silu(gate) * up, all [..., F] (Shazeer 2020), of which the backward pass keeps gate and up,
    and makes the rest anew; with `apart` not together with the product itself, which the gradient
    of the next weight needs before."""
    del apart
    return _gated(gate, up)


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _gated_forward(gate: jax.Array, up: jax.Array, apart: bool) -> Any:
    del apart
    return _gated(gate, up), (gate, up)


def _gated_backward(
    apart: bool, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if apart:
        saved = jax.lax.optimization_barrier(saved)
    _, pull = jax.vjp(_gated, *saved)
    of_gate, of_up = pull(gradient)
    return of_gate, of_up


gated.defvjp(_gated_forward, _gated_backward)


def rematerialized(run: Callable[..., Any], compute: Compute) -> Callable[..., Any]:
    """`run(layer, x, context, …)` with what its gradient needs kept as `compute.remat` says."""
    policies = jax.checkpoint_policies
    match compute.remat:
        case "full":
            return jax.checkpoint(run, policy=policies.nothing_saveable)
        case "dots":
            return jax.checkpoint(run, policy=policies.dots_with_no_batch_dims_saveable)
        case "offload":
            return jax.checkpoint(
                lambda layer, x, *rest: run(layer, checkpoint_name(x, _INPUT), *rest),
                policy=policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=[_INPUT],
                    offload_src="device",
                    offload_dst="pinned_host",
                ),
            )
    return run
