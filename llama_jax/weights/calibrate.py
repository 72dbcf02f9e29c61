"""The largest inputs that each weight sees on unlabelled tokens: what static scales are made of."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.weights.inputs import first_inputs, head_inputs, layers_of, run_layer


def calibrate(
    config: ModelConfig,
    params: tree.Tree,
    rows: Iterable[np.ndarray],
    *,
    compute: Compute,
) -> dict[str, jax.Array]:
    """Path -> the largest magnitude of the inputs of each of its matrices, float32 [L], or [] of
    the head, over `rows` of token ids of any length. Weights that nothing is multiplied with, and
    those of experts, are left out.

    Raises ValueError when there is no row, and when an input is not finite.
    """

    @jax.jit
    def run(layer: tree.Tree, x: jax.Array, real: jax.Array) -> tuple[jax.Array, Any]:
        return run_layer(config, layer, x, real, compute=compute, take=_peak)

    running = first_inputs(params, rows, compute=compute)
    peaks: dict[str, Any] = {}
    for layer in layers_of(config, params):
        outs, found = zip(*(run(layer, x, real) for x, real in running), strict=True)
        running = [(out, real) for out, (_, real) in zip(outs, running, strict=True)]
        for path in found[0]:
            peaks.setdefault(path, []).append(jnp.stack([of[path] for of in found]).max(axis=0))
    ends = [head_inputs(config, params, x, real, take=_peak) for x, real in running]
    largest = {path: jnp.stack(each) for path, each in peaks.items() if ".experts." not in path}
    largest[ends[0][0]] = jnp.stack([peak for _, peak in ends]).max()
    if bad := sorted(path for path, peak in largest.items() if not jnp.isfinite(peak).all()):
        raise ValueError(
            f"the inputs of {', '.join(bad[:3])} are not finite; nothing can be scaled"
        )
    return largest


def _peak(inputs: jax.Array, counts: jax.Array) -> jax.Array:
    wide = jnp.abs(inputs.astype(jnp.float32))
    return jnp.max(jnp.where(counts[:, None] > 0, wide, 0.0))
