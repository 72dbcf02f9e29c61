"""What users give `forward`, looked at before anything is computed of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import Compute, ModelConfig, require_type


def check_arguments(config: Any, params: Any, compute: Any, tokens: Any, **optional: Any) -> None:
    """optional: arrays of ids like `tokens`, or None.

    Raises ValueError for the first that is of another type or shape, or an id that the model has
    not, and says what is allowed.
    """
    require_type("config", config, ModelConfig, "a ModelConfig, such as model.config")
    require_type("params", params, dict, "the tree of parameters, such as model.params")
    lacking = [name for name in ("embed_tokens", "layers", "norm") if name not in params]
    if lacking:
        raise ValueError(
            f"params holds {', '.join(map(str, params)) or 'nothing'}, but no "
            f"{', '.join(lacking)}; give the whole tree of parameters, such as model.params"
        )
    require_type("compute", compute, Compute, "a Compute, such as Compute(dtype='bfloat16')")
    _check_ids("tokens", tokens, like=tokens)
    for name, ids in optional.items():
        if ids is not None:
            _check_ids(name, ids, like=tokens)
    _check_range(tokens, config.vocab_size)


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
