"""A smaller dense model out of a larger one: whole layers, heads and units are left out.

What is kept is named by indices, for all layers alike or for each layer its own. The result is a
plain model of a smaller config, which every other part of the project takes like any other.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.adapted import is_adapted
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.table import Weight, weight_table

# Fields of the config that a cut may make smaller.
FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


def check_plain(params: tree.Tree) -> None:
    """Raises ValueError for weights that are no plain arrays, or not stacked."""
    if not isinstance(params["layers"], dict):
        raise ValueError("params hold one tree per layer; give stacked layers")
    for path, leaf in tree.flatten(params).items():
        if is_quantized(leaf) or is_adapted(leaf):
            kind = "quantized" if is_quantized(leaf) else "adapted"
            raise ValueError(
                f"{path} is {kind}; only plain weights can be pruned, cut or calibrated, so export "
                f"the model with --merge first"
            )


def evenly(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` of the numbers below `count`, spread evenly, the first and the last among them:
    every k-th layer, and the one next to the head."""
    if not 1 <= wanted <= count:
        raise ValueError(f"{wanted} of {count} layers cannot be kept; give 1 to {count}")
    if wanted == 1:
        return (0,)
    return tuple(round(i * (count - 1) / (wanted - 1)) for i in range(wanted))


def keep_layers(
    config: ModelConfig, params: tree.Tree, layers: Sequence[int]
) -> tuple[ModelConfig, tree.Tree]:
    """The model with these layers alone, in the order given."""
    kept = np.asarray(layers, np.int32)
    found = {
        path: leaf[kept] if path.startswith("layers.") else leaf
        for path, leaf in tree.flatten(params).items()
    }
    return config.replace(num_hidden_layers=len(kept)), tree.unflatten(found)


def keep_units(
    config: ModelConfig,
    params: tree.Tree,
    *,
    kv_heads: np.ndarray | None = None,
    query_heads: np.ndarray | None = None,
    mlp: np.ndarray | None = None,
    hidden: np.ndarray | None = None,
) -> tuple[ModelConfig, tree.Tree]:
    """The model with some of its heads, mlp units and hidden dimensions.

    kv_heads [L, K'] of the key/value heads; query_heads [L, N'] of the query heads, which must be
    those that the kept key/value heads serve, equally many each; mlp [L, F'], or [L, E, F'] with
    experts; hidden [D'], for all layers alike, since they add up in one stream.
    """
    size = config.head_dim
    changes = {
        "heads": _rows(query_heads, size),
        "kv_heads": _rows(kv_heads, size),
        "mlp": mlp,
        "embed": hidden,
        "expert_embed": hidden,
    }
    found = {}
    for path, leaf in tree.flatten(params).items():
        row = weight_table(config)[path]
        for dim, axis in enumerate(_unit_axes(row)):
            if axis in changes and changes[axis] is not None:
                leaf = _take(leaf, changes[axis], dim)
        found[path] = leaf
    config = config.replace(
        num_key_value_heads=_count(kv_heads, config.num_key_value_heads),
        num_attention_heads=_count(query_heads, config.num_attention_heads),
        intermediate_size=_count(mlp, config.intermediate_size),
        hidden_size=_count(hidden, config.hidden_size),
    )
    return config, tree.unflatten(found)


def _count(kept: np.ndarray | None, all_of_them: int) -> int:
    return all_of_them if kept is None else int(np.shape(kept)[-1])


def _rows(heads: np.ndarray | None, size: int) -> np.ndarray | None:
    """[L, N'] heads -> [L, N' * size] rows of a projection."""
    if heads is None:
        return None
    rows = np.asarray(heads)[..., None] * size + np.arange(size)
    return rows.reshape(*np.shape(heads)[:-1], -1)


def _unit_axes(row: Weight) -> tuple[str | None, ...]:
    """The row's axes; a norm's values belong to the hidden dimensions."""
    return (*row.axes[:-1], "embed") if row.role == "norm" else row.axes


def _take(leaf: Any, kept: Any, dim: int) -> jax.Array:
    """`leaf` with the kept indices of a dimension: the same everywhere, or for each of a stack."""
    kept = jnp.asarray(kept, jnp.int32)
    if kept.ndim == 1:
        return jnp.take(leaf, kept, axis=dim)
    stack = kept.ndim - 1
    shape = [1] * leaf.ndim
    shape[:stack], shape[dim] = kept.shape[:stack], kept.shape[-1]
    return jnp.take_along_axis(leaf, kept.reshape(shape), axis=dim)


def first_slices(
    config: ModelConfig, params: tree.Tree, wanted: ModelConfig
) -> tuple[ModelConfig, tree.Tree]:
    """A student's start: layers spread evenly, and of every width the first units. Every group of
    query heads stays with its key/value head."""
    check_smaller(config, wanted)
    layers = evenly(config.num_hidden_layers, wanted.num_hidden_layers)
    config, params = keep_layers(config, params, layers)
    count, group = len(layers), config.num_query_groups
    kv_heads = query_heads = None
    heads = (wanted.num_key_value_heads, wanted.num_attention_heads)
    if heads != (config.num_key_value_heads, config.num_attention_heads):
        first = np.arange(wanted.num_key_value_heads)
        kv_heads = np.tile(first, (count, 1))
        chosen = first[:, None] * group + np.arange(wanted.num_query_groups)
        query_heads = np.tile(chosen.reshape(-1), (count, 1))
    hidden = mlp = None
    if wanted.hidden_size != config.hidden_size:
        hidden = np.arange(wanted.hidden_size)
    if wanted.intermediate_size != config.intermediate_size:
        mlp = np.arange(wanted.intermediate_size)
    return keep_units(
        config, params, kv_heads=kv_heads, query_heads=query_heads, mlp=mlp, hidden=hidden
    )


def check_smaller(config: ModelConfig, wanted: ModelConfig) -> None:
    """Raises ValueError unless `wanted` is `config` with fields of `FIELDS` made smaller."""
    for name in FIELDS:
        larger, smaller = getattr(config, name), getattr(wanted, name)
        if smaller > larger:
            raise ValueError(
                f"{name} is {smaller}, but the model to take slices of has only {larger}"
            )
    if wanted.num_query_groups > config.num_query_groups:
        raise ValueError(
            f"num_attention_heads {wanted.num_attention_heads} with num_key_value_heads "
            f"{wanted.num_key_value_heads} makes {wanted.num_query_groups} query heads of a "
            f"key/value head, but the model to take slices of has {config.num_query_groups}"
        )
    expected = config.replace(**{name: getattr(wanted, name) for name in FIELDS})
    for name, value in wanted.to_dict().items():
        if value != expected.to_dict()[name]:
            raise ValueError(
                f"{name} is {value!r}, but slices of the model have {expected.to_dict()[name]!r}; "
                f"only {', '.join(FIELDS)} may change"
            )
