"""Folders of tiny models that are merged, and what a merge of them gives."""

import jax.numpy as jnp
import numpy as np
import tokenizers

from llama_jax import tree
from llama_jax.formats.hf import save_hf
from llama_jax.formats.safetensors import SafetensorsFile
from llama_jax.merge.model import merge_models
from llama_jax.weights.merge_recipe import read_recipe
from tests.tiny import FAMILIES, tiny_params

CONFIG = FAMILIES["llama-gqa"]


def write_tokenizer(folder, words):
    """A word-level tokenizer whose id i is words[i]."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    )
    backend.save(str(folder / "tokenizer.json"))


def words(count):
    return [f"w{i}" for i in range(count)]


def save(folder, config=CONFIG, seed=0, params=None, tokens=None):
    """A model folder: random weights, or the given ones."""
    save_hf(folder, config, tiny_params(config, seed) if params is None else params)
    if tokens is not None:
        write_tokenizer(folder, tokens)
    return str(folder)


def tensors(folder) -> dict[str, np.ndarray]:
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: np.asarray(file.view(name)) for name in file.header.tensors}


def merge(tmp_path, recipe, name="out", **options):
    merged = merge_models(read_recipe(recipe, "recipe"), tmp_path / name, **options)
    return merged, tensors(tmp_path / name)


def constant(value: float, dtype="float32"):
    config = CONFIG.replace(dtype=dtype)
    return config, tree.unflatten(
        {
            path: jnp.full(leaf.shape, value, dtype)
            for path, leaf in tree.flatten(tiny_params(CONFIG)).items()
        }
    )
