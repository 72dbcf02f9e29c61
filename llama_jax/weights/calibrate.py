"""The largest inputs that each weight sees on unlabelled tokens: what static scales are made of."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.model.layout import unstack_layers
from llama_jax.model.transformer import forward
from llama_jax.weights.select import table_rows
from llama_jax.weights.tensors import Leaf, ObservedTensor


def calibrate(
    config: ModelConfig,
    params: tree.Tree,
    batches: Iterable[np.ndarray],
    *,
    compute: Compute,
) -> dict[str, jax.Array]:
    """Path -> the largest magnitude of the inputs of each of its matrices, float32 [L], or [] of a
    weight outside the layers, over `batches` of tokens [B, T] without padding. Weights that nothing
    is multiplied with, and those of experts, are left out.

    Raises ValueError when there is no batch, and when an input is not finite.
    """
    rows = table_rows(config, params)
    seen: dict[tuple[str, int | None], float] = defaultdict(float)

    def note(key: tuple[str, int | None], peak: Any) -> None:
        seen[key] = max(seen[key], float(peak)) if np.isfinite(peak) else float("nan")

    def observed(path: str, leaf: Leaf) -> Leaf:
        parts = path.split(".")
        layer = int(parts.pop(1)) if parts[0] == "layers" else None
        name = ".".join(parts)
        if rows[name].contracted is None and rows[name].role != "embedding":
            return leaf
        if ".experts." in name or rows[name].role == "router":
            return leaf
        return ObservedTensor(leaf, _Seen(partial(note, (name, layer))))

    apart = tree.map_with_path(observed, unstack_layers(params))
    run = jax.jit(lambda params, tokens: forward(config, params, tokens, compute=compute))
    count = 0
    for tokens in batches:
        jax.block_until_ready(run(apart, jnp.asarray(tokens)))
        count += 1
    jax.effects_barrier()
    if not count:
        raise ValueError("there is nothing to calibrate with: no row of tokens was given")
    bad = sorted({name for (name, _), peak in seen.items() if not np.isfinite(peak)})
    if bad:
        raise ValueError(
            f"the inputs of {', '.join(bad[:3])} are not finite; nothing can be scaled"
        )
    return _stacked(seen, config.num_hidden_layers)


class _Seen:
    """A callback that is told from others by identity, as a static field must be."""

    def __init__(self, call: Callable[[Any], None]):
        self._call = call

    def __call__(self, peak: Any) -> None:
        self._call(peak)


def _stacked(seen: dict[tuple[str, int | None], float], num_layers: int) -> dict[str, jax.Array]:
    names = {name for name, _ in seen}
    return {
        name: jnp.asarray(
            seen[name, None]
            if (name, None) in seen
            else [seen[name, layer] for layer in range(num_layers)],
            jnp.float32,
        )
        for name in sorted(names)
    }
