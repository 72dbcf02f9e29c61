"""The tokenizers of the models of a merge, and that of the result."""

import functools
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.formats.peft_config import CONFIG_NAME
from llama_jax.load import load_abstract
from llama_jax.weights.merge_recipe import Recipe


@functools.lru_cache(maxsize=8)
def own_tokenizer(model: str) -> Any:
    from llama_jax.formats.tokenizer import load_tokenizer

    path = Path(model)
    if (path / CONFIG_NAME).is_file():
        has_own = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return load_tokenizer(path) if has_own else None
    return load_abstract(model).tokenizer


def recipe_tokenizer(recipe: Recipe) -> Any:
    """Of the input or model that the recipe names, or of the first input."""
    inputs = dict(recipe.inputs)
    if recipe.tokenizer is None:
        return own_tokenizer(recipe.inputs[0][1])
    tokenizer = own_tokenizer(inputs.get(recipe.tokenizer, recipe.tokenizer))
    if tokenizer is None:
        raise ValueError(f"tokenizer is {recipe.tokenizer}, which brings no tokenizer")
    return tokenizer


def with_ids(recipe: Recipe, config: ModelConfig) -> ModelConfig:
    """Begin, end and padding follow the model that the tokenizer is from."""
    if recipe.tokenizer is None:
        return config
    model = dict(recipe.inputs).get(recipe.tokenizer, recipe.tokenizer)
    if (Path(model) / CONFIG_NAME).is_file():
        return config
    other = load_abstract(model).config
    return config.replace(
        bos_token_id=other.bos_token_id,
        eos_token_id=other.eos_token_id,
        pad_token_id=other.pad_token_id,
    )
