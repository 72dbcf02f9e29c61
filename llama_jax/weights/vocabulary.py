"""Surgery on the two matrices that have a row for each token: the embedding and the head."""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.adapted import is_adapted
from llama_jax.weights.quantized import is_quantized


def untie_embeddings(config: ModelConfig, params: tree.Tree) -> tuple[ModelConfig, tree.Tree]:
    """A config and parameters with a head of its own, at first equal to the embedding.

    The array is shared, not copied, until one of the two is trained or replaced.
    """
    if not config.tie_word_embeddings:
        raise ValueError("the embedding and the head of this model are not tied")
    head = {"weight": params["embed_tokens"]["weight"]}
    return config.replace(tie_word_embeddings=False), {**params, "lm_head": head}


def resize_vocabulary(
    config: ModelConfig, params: tree.Tree, new_rows: dict[str, jax.Array]
) -> tuple[ModelConfig, tree.Tree]:
    """Appends rows to the embedding and the head; what was there stays bit for bit.

    new_rows: by path (`embed_tokens.weight`, and `lm_head.weight` where it exists), arrays
    [added, D], the same number for both.
    """
    wanted = [path for path in ("embed_tokens.weight", "lm_head.weight") if _has(params, path)]
    if sorted(new_rows) != sorted(wanted):
        raise ValueError(
            f"resizing this model's vocabulary takes new rows for {' and '.join(wanted)}, but "
            f"{' and '.join(sorted(new_rows)) or 'none'} came"
        )
    counts = {path: rows.shape[0] for path, rows in new_rows.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the numbers of new rows differ: {counts}")
    leaves = tree.flatten(params)
    for path, rows in new_rows.items():
        old: Any = leaves[path]
        if is_quantized(old) or is_adapted(old):
            raise ValueError(f"{path} is quantized or adapted; resize the vocabulary before that")
        if rows.ndim != 2 or rows.shape[1] != old.shape[1]:
            raise ValueError(
                f"new rows of {path} have shape {rows.shape}; they must be [added, {old.shape[1]}]"
            )
        leaves[path] = jnp.concatenate([old, rows.astype(old.dtype)])
    added = next(iter(counts.values()))
    return config.replace(vocab_size=config.vocab_size + added), tree.unflatten(leaves)


def _has(params: tree.Tree, path: str) -> bool:
    return path.split(".")[0] in params
