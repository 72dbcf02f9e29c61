"""Merging models into a Hugging Face folder, tensor by tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.formats.atomic import atomic_folder, check_target
from llama_jax.formats.hf import in_file_order, write_descriptions
from llama_jax.formats.safetensors import TensorSpec, parse_bytes, write_sharded
from llama_jax.merge.adapter import merge_adapters
from llama_jax.merge.shapes import check_shapes
from llama_jax.merge.sources import open_sources
from llama_jax.merge.tensor import merged_tensor
from llama_jax.merge.tokenizer import recipe_tokenizer, with_ids
from llama_jax.merge.vocabulary import shared_rows
from llama_jax.weights.merge_recipe import Recipe


@dataclass(frozen=True)
class Merged:
    """tensors: how many were written. shared_rows: of the embedding, those that were merged; None
    where all of them were."""

    files: list[Path]
    tensors: int
    shared_rows: int | None


def merge_models(
    recipe: Recipe,
    out: str | Path,
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Any = None,
) -> Merged:
    """Writes the model that a recipe describes as a Hugging Face folder, or the adapter as a PEFT
    folder, which appears whole.

    max_shard_size: of one file of a model, 5GB unless said; an adapter is one file whatever its
    size. progress: told(tensors done, tensors in all, name).

    Raises ValueError, before anything is written, for inputs that do not fit each other, naming
    the inputs and the sizes.
    """
    check_target(out, overwrite=overwrite)
    if recipe.output == "adapter" and max_shard_size is not None:
        raise ValueError(
            f"max_shard_size is {max_shard_size}, but the recipe's output is adapter, which is "
            "written as one file; leave max_shard_size (--max-shard-size) out"
        )
    max_bytes = parse_bytes("5GB" if max_shard_size is None else max_shard_size)
    sources = open_sources(recipe)
    if recipe.output == "adapter":
        count = merge_adapters(recipe, sources, Path(out), overwrite=overwrite)
        return Merged(sorted(Path(out).iterdir()), count, None)
    config, tokenizer = sources[0].config, recipe_tokenizer(recipe)
    check_shapes(recipe, sources)
    shared = shared_rows(recipe, sources)
    if tokenizer is not None:
        tokenizer.check_vocab(config.vocab_size)
        config = with_ids(recipe, config)
    wanted = None if recipe.dtype is None else np.dtype(jnp.dtype(recipe.dtype))
    specs, places = [], {}
    for row, name, at in in_file_order(config):
        kind = wanted or sources[0].stored(row, name, at)
        specs.append(TensorSpec(name, kind, row.shape[len(at) :]))
        places[name] = (row, at)
    done = 0

    def merged(spec: TensorSpec) -> np.ndarray:
        nonlocal done
        if progress is not None:
            progress(done, len(specs), spec.name)
        done += 1
        return merged_tensor(recipe, sources, spec, places[spec.name], shared)

    with atomic_folder(out, overwrite=overwrite) as temporary:
        write_descriptions(temporary, config, {spec.dtype.name for spec in specs}, tokenizer)
        write_sharded(
            temporary, specs, merged, max_shard_bytes=max_bytes, metadata={"format": "pt"}
        )
    if progress is not None:
        progress(len(specs), len(specs), "written")
    files = sorted(Path(out).iterdir())
    return Merged(files, len(specs), None if shared is None else int(shared.sum()))
