"""A sum of PEFT adapters as one adapter."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.formats.peft import save_adapter
from llama_jax.merge.sources import AdaptedSource, Source
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.lora_sum import weighted_sum
from llama_jax.weights.merge_recipe import Recipe
from llama_jax.weights.table import weight_table


def merge_adapters(recipe: Recipe, sources: list[Source], out: Path, *, overwrite: bool) -> int:
    """Writes one adapter in place of several, for the same base; returns of how many weights."""
    base, *others = sources
    parts = []
    for (name, model), source in zip(recipe.inputs[1:], others, strict=True):
        if not isinstance(source, AdaptedSource):
            raise ValueError(
                f"output is adapter, but {name} ({model}) is a model and no PEFT adapter; what it "
                f"differs from the base in has no low rank: leave output out to write a model"
            )
        parts.append(
            {k: v for k, v in source.leaves.items() if isinstance(v, LoraTensor | SavedTensor)}
        )
    weights = [recipe.scale * entry.weight for entry in recipe.entries]
    if recipe.normalize:
        total = sum(entry.weight for entry in recipe.entries)
        weights = [weight / total for weight in weights]
    table = weight_table(base.config)

    def whole(path: str) -> np.ndarray:
        row = table[path]
        values = np.empty(row.shape, np.float32)
        for name, at in row.hf_names():
            bounds = (0, row.shape[len(at)])
            values[at] = base.rows(row, name, at, bounds, np.float32)
        return values

    merged = weighted_sum(parts, weights, whole)
    if recipe.dtype is not None:
        kind = jnp.dtype(recipe.dtype)
        merged = {path: _in_dtype(leaf, kind) for path, leaf in merged.items()}
    save_adapter(
        out,
        base.config,
        tree.unflatten(merged),
        base_model_name_or_path=recipe.inputs[0][1],
        overwrite=overwrite,
    )
    return len(merged)


def _in_dtype(leaf: Any, kind: Any) -> Any:
    if isinstance(leaf, SavedTensor):
        return SavedTensor(None, leaf.saved.astype(kind))
    return dataclasses.replace(
        leaf, lora_a=leaf.lora_a.astype(kind), lora_b=leaf.lora_b.astype(kind)
    )
