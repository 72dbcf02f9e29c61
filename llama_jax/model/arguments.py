"""What users give `forward`, looked at before anything is computed of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig, require_type
from llama_jax.weights.table import weight_table


def check_arguments(config: Any, params: Any, compute: Any, tokens: Any, **optional: Any) -> None:
    """optional: arrays of ids like `tokens`, or None.

    Raises ValueError for the first that is of another type or shape, or an id that the model has
    not, and says what is allowed.
    """
    require_type("config", config, ModelConfig, "a ModelConfig, such as model.config")
    check_params(config, params)
    require_type("compute", compute, Compute, "a Compute, such as Compute(dtype='bfloat16')")
    _check_ids("tokens", tokens, like=tokens)
    for name, ids in optional.items():
        if ids is not None:
            _check_ids(name, ids, like=tokens)
    _check_range(tokens, config.vocab_size)


def check_params(config: ModelConfig, params: Any) -> None:
    """Raises ValueError, naming the first weight at fault, for parameters that are not those of
    `config`, with layers stacked or apart."""
    require_type("params", params, dict, "the tree of parameters, such as model.params")
    lacking = [name for name in ("embed_tokens", "layers", "norm") if name not in params]
    if lacking:
        raise ValueError(
            f"params holds {', '.join(map(str, params)) or 'nothing'}, but no "
            f"{', '.join(lacking)}; give the whole tree of parameters, such as model.params"
        )
    wanted, found = _shapes(config, params["layers"]), tree.flatten(params)
    for path in (*wanted, *found):
        shape, leaf = wanted.get(path), found.get(path)
        have = None if leaf is None else tuple(leaf.shape)
        if have != shape:
            raise ValueError(
                f"{path} has shape {have or 'none'} in params and {shape or 'none'} by config; "
                f"give the two of one model, such as model.config and model.params"
            )


def _shapes(config: ModelConfig, layers: Any) -> dict[str, tuple[int, ...]]:
    table = weight_table(config)
    if isinstance(layers, dict):
        return {path: row.shape for path, row in table.items()}
    shapes = {}
    for path, row in table.items():
        if not path.startswith("layers."):
            shapes[path] = row.shape
            continue
        for layer in range(config.num_hidden_layers):
            shapes[f"layers.{layer}.{path.removeprefix('layers.')}"] = row.shape[1:]
    return shapes


def _check_ids(name: str, ids: Any, *, like: Any) -> None:
    allowed = "an integer array [B, T], such as jnp.asarray([[1, 2, 3]])"
    require_type(name, ids, (jax.Array, np.ndarray), allowed)
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} is {ids.dtype} of shape {ids.shape}; give {allowed}")
    if ids.shape != like.shape:
        raise ValueError(
            f"{name} has shape {ids.shape}, but tokens {like.shape}; give one for each"
        )


def _check_range(tokens: Any, vocab_size: int) -> None:
    """What is traced, or lies on the devices of other processes too, is not known here."""
    if isinstance(tokens, jax.core.Tracer):
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    ids = np.asarray(tokens)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"tokens holds the id {low if low < 0 else high}; the model's are 0 to {vocab_size - 1}"
        )
