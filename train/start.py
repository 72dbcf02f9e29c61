"""What a run starts from: architecture, tokenizer and weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import tree
from llama_jax.config import LogicalRules, ModelConfig, check_keys
from llama_jax.load import load, load_abstract
from llama_jax.presets import presets
from llama_jax.weights.table import abstract_params
from train.config import ModelSection, RunConfig
from train.data.files import PACKAGE_PREFIX, package_path


@dataclass(frozen=True)
class Start:
    """params: shape structs of the weights that training starts from."""

    config: ModelConfig
    params: tree.Tree
    tokenizer: Any


def read_start(run: RunConfig) -> Start:
    """Everything but the weights themselves.

    Raises ValueError for a model without a tokenizer, for one whose ids the model has no rows for,
    and for a sequence length beyond the model's positions.
    """
    section = run.model
    if section.init == "random" and section.name in presets:
        # A preset is a shape only: its tokenizer must be named.
        config, params, tokenizer = presets[section.name], None, None
        if section.tokenizer is None:
            raise ValueError(
                f"model.name {section.name} is a preset, which brings no tokenizer; name one in "
                f"model.tokenizer"
            )
    else:
        stored = load_abstract(section.name)
        config, params, tokenizer = stored.config, stored.params, stored.tokenizer
    if section.init == "random":
        config, params = _overridden(section, config), None
    if section.dtype is not None and section.dtype != config.dtype:
        if params is not None and not _is_plain(params):
            raise ValueError(
                f"model.dtype is {section.dtype}, but {section.name} holds quantized or adapted "
                f"weights, whose numbers have types of their own; leave model.dtype out"
            )
        config, params = config.replace(dtype=section.dtype), None
    if params is None:
        params = abstract_params(config)
    if section.tokenizer is not None:
        tokenizer = _named_tokenizer(section.tokenizer)
    if tokenizer is None:
        raise ValueError(
            f"the model {section.name} brings no tokenizer; name one in model.tokenizer"
        )
    tokenizer.check_vocab(config.vocab_size)
    length, limit = run.train.sequence_length, config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"train.sequence_length is {length}, but the model reads at most {limit} positions "
            f"(max_position_embeddings)"
        )
    return Start(config, params, tokenizer)


def _overridden(section: ModelSection, config: ModelConfig) -> ModelConfig:
    values = config.to_dict()
    check_keys("model.overrides", section.overrides, list(values))
    return ModelConfig.from_dict({**values, **section.overrides})


def _named_tokenizer(name: str) -> Any:
    from llama_jax.formats.tokenizer import load_tokenizer

    if name.startswith(PACKAGE_PREFIX):
        return load_tokenizer(package_path(name))
    # A folder is read for its tokenizer alone, whatever else is in it.
    return load_tokenizer(name) if Path(name).is_dir() else load_abstract(name).tokenizer


def _is_plain(params: tree.Tree) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in tree.flatten(params).values())


def load_weights(run: RunConfig, start: Start, *, mesh: Mesh, rules: LogicalRules) -> tree.Tree:
    """The stored weights, each straight to its place on the mesh."""
    # Named even when it is the declared one: files may hold single tensors in another.
    dtype = start.config.dtype if _is_plain(start.params) else None
    return load(run.model.name, mesh=mesh, rules=rules, dtype=dtype).params
