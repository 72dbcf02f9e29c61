"""Which rows of the vocabulary mean the same in all models of a merge."""

from typing import Any

import numpy as np

from llama_jax.merge.sources import Source
from llama_jax.merge.tokenizer import own_tokenizer
from llama_jax.weights.merge_recipe import Recipe

_SHOWN = 3


def shared_rows(recipe: Recipe, sources: list[Source]) -> np.ndarray | None:
    """Which rows of the vocabulary are merged, [V of the result]; None: all.

    Raises ValueError when sizes or tokens differ and the recipe has no policy for that.
    """
    sizes = [source.config.vocab_size for source in sources]
    rows = np.arange(sizes[0])
    if recipe.vocabulary == "keep":
        return rows < 0
    tables = [_tokens(model) for _, model in recipe.inputs]
    same = rows < min(sizes)
    for table in tables[1:]:
        if table is not None and tables[0] is not None:
            alike = [tables[0].get(i) == table.get(i) for i in rows.tolist()]
            same &= np.asarray(alike, bool)
    if same.all() and len(set(sizes)) == 1:
        return None
    if recipe.vocabulary == "shared_rows":
        if not same.any():
            raise ValueError("vocabulary is shared_rows, but no row means the same token in all")
        return same
    stated = ", ".join(
        f"{name} has {size}" for (name, _), size in zip(recipe.inputs, sizes, strict=True)
    )
    raise ValueError(
        f"the vocabularies differ: of the rows of the embedding {stated}"
        f"{_differing(tables, same, min(sizes))}. Set vocabulary: shared_rows to merge the rows "
        f"that mean the same token in all and leave the rest of {recipe.inputs[0][0]} as it is, or "
        f"vocabulary: keep to leave its embedding and head alone"
    )


def _differing(tables: list[Any], same: np.ndarray, common: int) -> str:
    at = np.flatnonzero(~same[:common])
    if not len(at):
        return ""
    shown = "; ".join(
        f"{i} is {' or '.join(dict.fromkeys(repr(t.get(int(i))) for t in tables if t is not None))}"
        for i in at[:_SHOWN]
    )
    return f", and {len(at)} rows that all have stand for different tokens ({shown})"


def _tokens(model: str) -> dict[int, str] | None:
    tokenizer = own_tokenizer(model)
    if tokenizer is None:
        return None
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {index: token for token, index in vocabulary.items()}
