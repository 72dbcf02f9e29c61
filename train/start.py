"""What a run starts from: architecture, tokenizer and weights."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import tree
from llama_jax.config import LogicalRules, ModelConfig, check_keys
from llama_jax.load import check_architecture, load, load_abstract
from llama_jax.mesh.sharding import shardings
from llama_jax.paths import to_path
from llama_jax.presets import presets
from llama_jax.weights.cut import check_smaller, first_slices
from llama_jax.weights.quantize import Quantization, quantize
from llama_jax.weights.table import abstract_params
from train.config import RunConfig
from train.data.files import PACKAGE_PREFIX, package_path
from train.sections.model import ModelSection


@dataclass(frozen=True)
class Start:
    """params: shape structs of the weights that training starts from."""

    config: ModelConfig
    params: tree.Tree
    tokenizer: Any


def read_start(run: RunConfig) -> Start:
    """Everything but the weights themselves.

    Raises ValueError for a model without a tokenizer, for one whose ids the model has no rows for,
    for one of another shape than `model.architecture`, and for a sequence length beyond the model's
    positions.
    """
    section = run.model
    if section.init == "random" and section.name in presets and section.tokenizer is None:
        # A preset is a shape only: its tokenizer must be named.
        raise ValueError(
            f"model.name {section.name} is a preset, which brings no tokenizer; name one in "
            f"model.tokenizer"
        )
    config, params, tokenizer = _shape(run, _stored(section))
    if section.tokenizer is not None:
        tokenizer = _named_tokenizer(section.tokenizer)
    if tokenizer is None:
        raise ValueError(
            f"the model {section.name} brings no tokenizer; name one in model.tokenizer"
        )
    tokenizer.check_vocab(config.vocab_size)
    return Start(config, params, tokenizer)


def read_shape(run: RunConfig) -> tuple[ModelConfig, tree.Tree]:
    """What is trained, as shape structs: of `model.architecture` if it is given, so that neither
    weights nor tokenizer need be there. Raises ValueError as `read_start` does."""
    section = run.model
    name = section.architecture or (section.name if section.init == "random" else None)
    stored = (presets[name], None, None) if name in presets else _stored(section)
    config, params, _ = _shape(run, stored)
    return config, params


def _stored(section: ModelSection) -> tuple[ModelConfig, tree.Tree | None, Any]:
    """(config, weights or None where there is only a shape, tokenizer) of `model.name`."""
    if section.init == "random" and section.name in presets:
        config, params, tokenizer = presets[section.name], None, None
    else:
        stored = load_abstract(section.name)
        config, params, tokenizer = stored.config, stored.params, stored.tokenizer
    check_architecture(section.architecture, section.name, config, field="model.architecture")
    return config, params, tokenizer


def _shape(
    run: RunConfig, stored: tuple[ModelConfig, tree.Tree | None, Any]
) -> tuple[ModelConfig, tree.Tree, Any]:
    section = run.model
    config, params, tokenizer = stored
    if section.init == "slices":
        _check_slices(section, config, params)
    if section.init != "weights":
        config, params = _overridden(section, config), None
    if section.dtype is not None and section.dtype != config.dtype:
        if params is not None and not _is_plain(params):
            raise ValueError(
                f"model.dtype is {section.dtype}, but {section.name} holds quantized or adapted "
                f"weights, whose numbers have types of their own; leave model.dtype out"
            )
        config, params = config.replace(dtype=section.dtype), None
    length, limit = run.train.sequence_length, config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"train.sequence_length is {length}, but the model reads at most {limit} positions "
            f"(max_position_embeddings)"
        )
    return config, abstract_params(config) if params is None else params, tokenizer


def _check_slices(section: ModelSection, config: ModelConfig, params: tree.Tree | None) -> None:
    if params is not None and not _is_plain(params):
        raise ValueError(
            f"model.init is slices, but {section.name} holds quantized or adapted weights; export "
            f"it with --merge first"
        )
    try:
        check_smaller(config, _overridden(section, config))
    except ValueError as error:
        raise ValueError(f"model.overrides: {error}") from error


def _overridden(section: ModelSection, config: ModelConfig) -> ModelConfig:
    values = config.to_dict()
    check_keys("model.overrides", section.overrides, list(values))
    return ModelConfig.from_dict({**values, **section.overrides})


def _named_tokenizer(name: str) -> Any:
    from llama_jax.formats.tokenizer import load_tokenizer

    if name.startswith(PACKAGE_PREFIX):
        return load_tokenizer(package_path(name))
    # A folder is read for its tokenizer alone, whatever else is in it.
    folder = to_path(name)
    return load_tokenizer(folder) if folder.is_dir() else load_abstract(name).tokenizer


def _is_plain(params: tree.Tree) -> bool:
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in tree.flatten(params).values())


def load_weights(
    run: RunConfig,
    start: Start,
    *,
    mesh: Mesh,
    rules: LogicalRules,
    quantization: Quantization | None,
) -> tree.Tree:
    """The stored weights, or slices of them, each straight to its place on the mesh, quantized on
    the way (slices, behind it)."""
    # Named even when it is the declared one: files may hold single tensors in another.
    dtype = start.config.dtype if _is_plain(start.params) else None
    if run.model.init != "slices":
        return load(
            run.model.name, mesh=mesh, rules=rules, dtype=dtype, quantization=quantization
        ).params
    loaded = load(run.model.name, mesh=mesh, rules=rules, dtype=dtype)
    places = shardings(start.config, start.params, mesh, rules)

    def cut(params: tree.Tree) -> tree.Tree:
        return first_slices(loaded.config, params, start.config)[1]

    params = jax.jit(cut, out_shardings=places)(loaded.params)
    if quantization is None:
        return params
    return quantize(start.config, params, **vars(quantization), donate=True)
