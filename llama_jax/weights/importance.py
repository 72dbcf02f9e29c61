"""What matters in a model: the sizes of the inputs of its weights, and how much each layer changes.

The model is run layer by layer over unlabelled rows, and only sums are kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.weights.cut import check_plain
from llama_jax.weights.inputs import first_inputs, layers_of, run_layer, stacked


@dataclass(frozen=True)
class Importance:
    """squares: path -> [L, in], or [L, E, in] of experts, sum over tokens of the squared inputs of
    a weight; influence: [L], the mean of 1 - cos(what goes into a layer, what comes out), after
    Men et al. 2024 (ShortGPT, arXiv:2403.03853): 0 for a layer that does nothing; tokens: how many
    were looked at."""

    squares: dict[str, np.ndarray]
    influence: np.ndarray
    tokens: int


def measure(
    config: ModelConfig, params: tree.Tree, rows: Iterable[np.ndarray], *, compute: Compute
) -> Importance:
    """Runs `rows`, token ids of any length each, in batches of one.

    Raises ValueError when there is no row, and for quantized or adapted weights.
    """
    check_plain(params)

    @jax.jit
    def run(layer: tree.Tree, x: jax.Array, real: jax.Array) -> tuple[jax.Array, Any]:
        out, squares = run_layer(config, layer, x, real, compute=compute, take=_squares)
        return out, {"squares": squares, "change": _change(x, out, real)}

    running = first_inputs(params, rows, compute=compute)
    tokens = int(sum(real.sum() for _, real in running))
    totals = []
    for layer in layers_of(config, params):
        outs, found = zip(*(run(layer, x, real) for x, real in running), strict=True)
        running = [(out, real) for out, (_, real) in zip(outs, running, strict=True)]
        totals.append(jax.tree.map(lambda *each: sum(each), *found))
    sums = stacked(totals)
    squares = {path: each for path, each in sums["squares"].items() if ".gate." not in path}
    return Importance(squares, sums["change"] / tokens, tokens)


def _squares(inputs: jax.Array, counts: jax.Array) -> jax.Array:
    return counts @ jnp.square(inputs.astype(jnp.float32))


def _change(before: jax.Array, after: jax.Array, real: jax.Array) -> jax.Array:
    a, b = before.astype(jnp.float32), after.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / jnp.maximum(norms, 1e-30)
    return ((1.0 - cosine) * real).sum()
