"""Parameters on their way out: checked against the config, then gathered one tensor at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import FLOAT_DTYPES, ModelConfig
from llama_jax.formats.safetensors import convert
from llama_jax.weights.adapted import is_adapted
from llama_jax.weights.table import weight_table
from llama_jax.weights.tensors import to_array


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is an array, neither quantized nor adapted nor laid out for one device."""
    return isinstance(leaf, jax.Array | np.ndarray)


def check_params(
    config: ModelConfig, params: tree.Tree, *, merge: bool, target: str
) -> dict[str, Any]:
    """Path -> leaf of parameters that can be exported whole, from this process.

    Raises ValueError naming every leaf at fault; adapters and quantized leaves only pass with
    `merge`. `target` says in the message what cannot hold them.
    """
    leaves = check_whole(config, params, target=target)
    problems = []
    for path, leaf in leaves.items():
        if not is_plain(leaf):
            if not merge:
                kind = "an adapter" if is_adapted(leaf) else "quantized weights"
                raise ValueError(
                    f"{path} holds {kind}, which {target} cannot; pass merge=True (--merge) to "
                    f"write the full matrices, or export the adapter as PEFT"
                )
        elif np.dtype(leaf.dtype).name not in FLOAT_DTYPES:
            problems.append(f"{path} is {leaf.dtype}, allowed are {', '.join(FLOAT_DTYPES)}")
    if problems:
        raise ValueError(f"params do not fit the config: {'; '.join(problems[:20])}")
    return leaves


def check_whole(config: ModelConfig, params: tree.Tree, *, target: str) -> dict[str, Any]:
    """Path -> leaf of parameters of whatever kind, with all that the config has, in one process.

    Raises ValueError naming every leaf at fault, and what cannot be written, `target`.
    """
    if isinstance(params.get("layers"), list | tuple):
        raise ValueError(f"params hold one tree per layer; {target} takes the stacked layers")
    leaves = tree.flatten(params)
    table = weight_table(config)
    problems = [f"{path} is missing" for path in table if path not in leaves]
    for path, leaf in leaves.items():
        if path not in table:
            problems.append(f"{path} is unexpected")
        elif tuple(leaf.shape) != table[path].shape:
            problems.append(f"{path} has shape {leaf.shape}, expected {table[path].shape}")
        if any(
            isinstance(array, jax.Array) and not array.is_fully_addressable
            for array in jax.tree.leaves(leaf)
        ):
            raise ValueError(
                f"{path} is spread over several processes; save a checkpoint from there and export "
                f"it from one process"
            )
    if problems:
        raise ValueError(f"params do not fit the config: {'; '.join(problems[:20])}")
    return leaves


def fetch(leaf: Any, at: tuple[int, ...], *, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """`leaf[at]` on the host, converted to `dtype`; `name` is for the error message."""
    tensor = take(leaf, at)
    if not is_plain(leaf):
        tensor = np.asarray(to_array(jax.tree.map(jnp.asarray, tensor)))
    return convert(tensor, dtype, name=name)


def take(leaf: Any, at: tuple[int, ...]) -> Any:
    """`leaf[at]` of a stack with its arrays on the host."""
    return jax.tree.map(lambda array: _take(array, at), leaf)


def _take(array: Any, at: tuple[int, ...]) -> np.ndarray:
    # Part of a quantized stack, such as a scale that all layers share, can have length 1.
    at = tuple(0 if size == 1 else i for i, size in zip(at, array.shape, strict=False))
    if isinstance(array, jax.Array) and not _is_on_one_cpu(array):
        return np.asarray(_index(array, at))
    return np.asarray(array)[at]


def _is_on_one_cpu(array: jax.Array) -> bool:
    """Whether NumPy can look at the array where it lies, without a copy."""
    return len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"


@jax.jit
def _index(array: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    """`array[at]`; one program for each shape, whatever the index."""
    for i in at:
        array = jax.lax.dynamic_index_in_dim(array, i, axis=0, keepdims=False)
    return array
