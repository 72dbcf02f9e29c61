"""Which arrays are trained, and which decay, as trees of booleans chosen through the weight table.

A mask has the structure of the parameters down to the arrays inside quantized and adapted tensors,
which is what `tree.partition` and an optimizer take.

Patterns name weights: `lm_head`, `layers.self_attn.*`, `q_proj`, `*.bias`, or a role such as
`role:norm`. A pattern with a leading `!` takes away instead, from everything if no other pattern
came before it. A pattern that matches nothing is an error, because a typing mistake must not
freeze a model.

Layers are one array on a stacked tree, and a boolean holds for a whole array: single layers can be
chosen by index (`layers.3.*`, `layers.[0-7].mlp`) only on a tree from `unstack_layers`. Adapters on
some layers alone need no mask: `LoraConfig.layers_to_transform` gives the others rank 0.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.adapted import LoraTensor, SavedTensor, is_adapted
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.table import Role, Weight, weight_table

Method = Literal["lora", "full"]

# Norm scales and biases are kept out of weight decay whatever their number of dimensions.
_DECAYED_ROLES: tuple[Role, ...] = ("matrix", "router", "embedding", "head")


def trainable_mask(
    config: ModelConfig, params: tree.Tree, patterns: Sequence[str] | None, *, method: Method
) -> tree.Tree:
    """True for each array that training updates.

    `full`: the weights that `patterns` match, all of them for None; adapted or quantized weights
    cannot be trained this way and are refused. `lora`: the factors of the adapters and the saved
    copies of `modules_to_save`, of the weights that `patterns` match or of all; never a scale,
    never a base. Raises ValueError for a pattern without a match and for an empty selection.
    """
    rows = table_rows(config, params)
    leaves = tree.flatten(params)
    if method == "lora":
        candidates = {path for path, leaf in leaves.items() if is_adapted(leaf)}
        if not candidates:
            raise ValueError(
                "method lora trains adapters, but no weight has one; call add_lora first"
            )
    elif method == "full":
        candidates = set(leaves)
    else:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(get_args(Method))}")
    chosen = candidates if patterns is None else match_weights(rows, patterns) & candidates
    if patterns is not None:
        _check_candidates(rows, patterns, candidates)
    if not chosen:
        raise ValueError(f"the patterns {list(patterns or ())} leave nothing to train")
    if method == "full":
        _check_full({path: leaves[path] for path in sorted(chosen)})

    def leaf_mask(path: str, leaf: Leaf) -> Any:
        return _leaf_trainable(leaf, path in chosen)

    return tree.map_with_path(leaf_mask, params)


def decay_mask(config: ModelConfig, params: tree.Tree) -> tree.Tree:
    """True for each array that weight decay shrinks, by the role of its weight.

    Matrices, router, embedding and head decay (as nanoGPT and HF's Trainer have it), and so do the
    adapters on them. Norm scales, biases, LoRA scales and everything inside a quantized tensor do
    not. Freezing is not this mask's business: combine it with `trainable_mask`.
    """
    rows = table_rows(config, params)

    def leaf_mask(path: str, leaf: Leaf) -> Any:
        return _leaf_decays(leaf, rows[path].role in _DECAYED_ROLES)

    return tree.map_with_path(leaf_mask, params)


def zeros_mask(config: ModelConfig, params: tree.Tree) -> tree.Tree:
    """True for each array whose zeros pruning leaves: the matrices of the layers. A zero bias or a
    zero norm is a value like any other."""
    rows = table_rows(config, params)

    def leaf_mask(path: str, leaf: Leaf) -> Any:
        return _all(leaf, rows[path].role == "matrix")

    return tree.map_with_path(leaf_mask, params)


def _leaf_trainable(leaf: Leaf, chosen: bool) -> Any:
    if isinstance(leaf, LoraTensor):
        return dataclasses.replace(
            leaf, base=_all(leaf.base, False), lora_a=chosen, lora_b=chosen, scale=False
        )
    if isinstance(leaf, SavedTensor):
        return SavedTensor(_all(leaf.base, False), chosen)
    return _all(leaf, chosen)


def _leaf_decays(leaf: Leaf, decays: bool) -> Any:
    if isinstance(leaf, LoraTensor):
        return dataclasses.replace(
            leaf,
            base=_leaf_decays(leaf.base, decays),
            lora_a=decays,
            lora_b=decays,
            scale=False,
        )
    if isinstance(leaf, SavedTensor):
        return SavedTensor(_leaf_decays(leaf.base, decays), decays)
    return _all(leaf, decays and not is_quantized(leaf))


def _all(leaf: Leaf, value: bool) -> Any:
    return jax.tree.map(lambda _: value, leaf)


def _check_full(chosen: Mapping[str, Leaf]) -> None:
    for path, leaf in chosen.items():
        if is_adapted(leaf):
            raise ValueError(
                f"{path} has an adapter, and method full would train the weight under it; merge "
                f"or remove the adapters, or train them with method lora"
            )
        if is_quantized(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{path} is quantized, so it has no gradient; leave it out of the patterns, "
                f"dequantize it, or train adapters on it with method lora"
            )


def _check_candidates(
    rows: Mapping[str, Weight], patterns: Sequence[str], candidates: Collection[str]
) -> None:
    for pattern in patterns:
        if not pattern.startswith("!") and not match_weights(rows, [pattern]) & set(candidates):
            raise ValueError(
                f"pattern {pattern!r} matches only weights without an adapter; name them in "
                f"target_modules or modules_to_save, or remove the pattern. Adapted are: "
                f"{', '.join(sorted(candidates))}"
            )


def match_weights(rows: Mapping[str, Weight], patterns: Sequence[str]) -> set[str]:
    """The paths among `rows` that the patterns choose; see the module's docstring for the rules."""
    if isinstance(patterns, str):
        raise ValueError(f"patterns is the string {patterns!r}; give a list of patterns")
    if not patterns:
        raise ValueError("patterns is empty; give at least one, or None for everything")
    chosen: set[str] = set(rows) if patterns[0].startswith("!") else set()
    for pattern in patterns:
        matched = {
            path for path, row in rows.items() if _matches(path, row, pattern.removeprefix("!"))
        }
        if not matched:
            raise ValueError(_no_match(rows, pattern))
        chosen = chosen - matched if pattern.startswith("!") else chosen | matched
    return chosen


def _matches(path: str, row: Weight, pattern: str) -> bool:
    if pattern.startswith("role:"):
        return row.role == pattern.removeprefix("role:")
    # A tree with layers apart is addressed by index or, as the stacked one, without.
    return any(
        fnmatch.fnmatchcase(f".{name}.", form)
        for name in {path, row.path}
        for form in (f".{pattern}.", f".{pattern}.*", f"*.{pattern}.", f"*.{pattern}.*")
    )


def _no_match(rows: Mapping[str, Weight], pattern: str) -> str:
    bare = pattern.removeprefix("!")
    if bare.startswith("role:"):
        roles = sorted({row.role for row in rows.values()})
        return f"pattern {pattern!r} matches no weight; this model has the roles {', '.join(roles)}"
    if re.match(r"(model\.)?layers\.[\[\d]", bare) and not any(
        _layer_index(path) is not None for path in rows
    ):
        return (
            f"pattern {pattern!r} names layers by index, but layers are stacked in one array and "
            f"are trained or frozen together; leave the index out, unstack the layers first, or "
            f"use adapters with layers_to_transform"
        )
    return f"pattern {pattern!r} matches no weight{suggestion(bare, rows)}"


def suggestion(name: str, paths: Collection[str]) -> str:
    """`; did you mean 'q_proj'?` if a path or a component of one is near, and the paths if not."""
    parts = {part for path in paths for part in path.split(".")}
    near = difflib.get_close_matches(name, sorted({*paths, *parts}), n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; the weights are {', '.join(paths)}"


def _layer_index(path: str) -> int | None:
    match = re.match(r"layers\.(\d+)\.", path)
    return int(match.group(1)) if match else None


def table_rows(config: ModelConfig, params: tree.Tree) -> dict[str, Weight]:
    """The table's row for every leaf of a tree with layers stacked or apart."""
    table = weight_table(config)
    rows = {}
    for path in tree.flatten(params):
        row = table.get(re.sub(r"^layers\.\d+\.", "layers.", path))
        if row is None:
            raise ValueError(
                f"the parameters hold {path}, which this model does not have"
                f"{suggestion(path, table)}"
            )
        rows[path] = row
    return rows
