"""Pruning: single weights set to zero, or layers, heads and units left out.

Single weights go by magnitude, or by Wanda's magnitude times the size of the input (Sun et al.
2023, arXiv:2306.11695), freely or N of every M neighbours. Heads and feed-forward units go by how
much they add to the residual stream, layers by how little they change it. How the smaller model is
put together is `cut.py`'s subject, what is measured `importance.py`'s.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.cut import check_plain, keep_layers, keep_units
from llama_jax.weights.importance import Importance
from llama_jax.weights.select import match_weights
from llama_jax.weights.table import weight_table


def prune_weights(
    config: ModelConfig,
    params: tree.Tree,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    importance: Importance | None = None,
    skip: Sequence[str] = (),
) -> tree.Tree:
    """The parameters with part of the layers' matrices set to exactly zero.

    sparsity: that part of every matrix, the weights of least score. pattern: (N, M), of every M
    neighbours of a row the N of largest score stay. Exactly one of the two is given. The score is
    the magnitude, compared over a whole matrix, or with `importance` Wanda's, compared within a
    row. Matrices that a pattern of `skip` names stay as they are.

    Raises ValueError for numbers out of range, a row length that M does not divide, a pattern of
    `skip` that names nothing, and weights that are no plain arrays.
    """
    check_plain(params)
    _check_amount(sparsity, pattern)
    rows = prunable(config, skip)
    leaves = tree.flatten(params)
    for path in rows:
        squares = None if importance is None else importance.squares[path]
        leaves[path] = _pruned(path, leaves[path], squares, sparsity, pattern)
    return tree.unflatten(leaves)


def _check_amount(sparsity: float | None, pattern: tuple[int, int] | None) -> None:
    if (sparsity is None) == (pattern is None):
        raise ValueError("give either a sparsity or an N:M pattern")
    if sparsity is not None and not 0.0 < sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}; it must be above 0 and below 1")
    if pattern is not None and not 0 < pattern[0] < pattern[1]:
        raise ValueError(
            f"the pattern is {pattern[0]}:{pattern[1]}; N:M keeps N of M, so N must be at least 1 "
            f"and below M"
        )


def prunable(config: ModelConfig, skip: Sequence[str] = ()) -> list[str]:
    """Paths of the layers' matrices that no pattern names; not embedding, head, router, norms."""
    table = weight_table(config)
    found = {path: row for path, row in table.items() if row.role == "matrix"}
    skipped = match_weights(found, list(skip)) if skip else set()
    if not found.keys() - skipped:
        raise ValueError(f"skip {', '.join(skip)} leaves no matrix to prune")
    return [path for path in found if path not in skipped]


def _pruned(
    path: str,
    leaf: Any,
    squares: np.ndarray | None,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
) -> jax.Array:
    """Matrix by matrix, so that scores exist for one of them at a time."""
    values = np.array(leaf)
    if pattern is not None and values.shape[-1] % pattern[1]:
        raise ValueError(
            f"the pattern is {pattern[0]}:{pattern[1]}, but the rows of {path} have "
            f"{values.shape[-1]} values, which {pattern[1]} does not divide"
        )
    for at in np.ndindex(values.shape[:-2]):
        score = np.abs(values[at].astype(np.float32))
        if squares is not None:
            score *= np.sqrt(squares[at].astype(np.float32))
        if pattern is not None:
            groups = score.reshape(score.shape[0], -1, pattern[1])
            gone = _smallest(groups, pattern[1] - pattern[0]).reshape(score.shape)
        elif squares is not None:
            assert sparsity is not None
            gone = _smallest(score, round(sparsity * score.shape[-1]))
        else:
            assert sparsity is not None
            flat = score.reshape(-1)
            gone = _smallest(flat, round(sparsity * flat.size)).reshape(score.shape)
        values[at][gone] = 0
    return jnp.asarray(values)


def _smallest(score: np.ndarray, count: int) -> np.ndarray:
    """Whether each value is one of the `count` smallest along the last dimension."""
    gone = np.zeros(score.shape, bool)
    if count:
        order = np.argpartition(score, count - 1, axis=-1)[..., :count]
        np.put_along_axis(gone, order, True, axis=-1)
    return gone


def sparsity_of(params: tree.Tree, paths: Sequence[str]) -> float:
    """The part of the values of these weights that is exactly zero, counted."""
    leaves = tree.flatten(params)
    zeros = sum(int((np.asarray(leaves[path]) == 0).sum()) for path in paths)
    return zeros / sum(leaves[path].size for path in paths)


# Structure


def drop_layers(
    config: ModelConfig, params: tree.Tree, keep: int, importance: Importance
) -> tuple[ModelConfig, tree.Tree, list[int]]:
    """The `keep` layers that change the stream most, in their order, and which those are."""
    count = config.num_hidden_layers
    if not 1 <= keep <= count:
        raise ValueError(f"{keep} layers cannot be kept of {count}; give 1 to {count}")
    kept = sorted(int(i) for i in np.argsort(-importance.influence, kind="stable")[:keep])
    return (*keep_layers(config, params, kept), kept)


def drop_heads(
    config: ModelConfig, params: tree.Tree, keep: int, importance: Importance | None = None
) -> tuple[ModelConfig, tree.Tree]:
    """Of each layer the `keep` key/value heads, with their query heads, that add most."""
    count, group, size = config.num_key_value_heads, config.num_query_groups, config.head_dim
    if not 1 <= keep <= count:
        raise ValueError(f"{keep} key/value heads cannot be kept of {count}; give 1 to {count}")
    check_plain(params)
    score = _added(params, "layers.self_attn.o_proj.weight", importance)
    per_head = score.reshape(len(score), count, group * size).sum(axis=-1)
    kept = np.sort(np.argsort(-per_head, axis=-1, kind="stable")[:, :keep], axis=-1)
    queries = (kept[..., None] * group + np.arange(group)).reshape(len(kept), -1)
    return keep_units(config, params, kv_heads=kept, query_heads=queries)


def drop_units(
    config: ModelConfig, params: tree.Tree, keep: int, importance: Importance | None = None
) -> tuple[ModelConfig, tree.Tree]:
    """Of each feed-forward layer, or expert, the `keep` hidden units that add most."""
    count = config.intermediate_size
    if not 1 <= keep <= count:
        raise ValueError(f"{keep} units cannot be kept of {count}; give 1 to {count}")
    check_plain(params)
    block = "layers.mlp.down_proj" if config.moe is None else "layers.block_sparse_moe.experts.w2"
    score = _added(params, f"{block}.weight", importance)
    kept = np.sort(np.argsort(-score, axis=-1, kind="stable")[..., :keep], axis=-1)
    return keep_units(config, params, mlp=kept)


def _added(params: tree.Tree, path: str, importance: Importance | None) -> np.ndarray:
    """[..., in]: the squared length of what each input of a matrix adds to its output, summed over
    tokens; without measurements as if all inputs were of one size."""
    weight = np.asarray(tree.flatten(params)[path]).astype(np.float32)
    lengths = np.square(weight).sum(axis=-2)
    return lengths if importance is None else lengths * importance.squares[path]
