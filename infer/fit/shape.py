"""The model that is served, and the one that drafts for it, as shape structs."""

import dataclasses
from typing import Any

import jax

from infer.batch import Runnable
from infer.engine.draft_model import check_draft
from infer.engine.guesses import undivided
from infer.engine.lowering import everywhere
from infer.server.build import quantization_of
from infer.server.settings import Settings
from llama_jax.config import ModelConfig
from llama_jax.model.layout import for_decoding
from llama_jax.presets import preset
from llama_jax.weights.table import abstract_params

# Config, parameters as shape structs, and the tokenizer where the model itself was looked at.
Shape = tuple[ModelConfig, Any, Any]


def read_shape(settings: Settings) -> Shape:
    """The model that is served, as shape structs: of `architecture` if it is given, so that no
    weights need be there. Raises ValueError."""
    if len(settings.models) != 1:
        raise ValueError(
            f"{len(settings.models)} models are given; what fits is found for one model at a time"
        )
    model = settings.models[0].partition("=")[2] or settings.models[0]
    config, params, tokenizer = _shape_of(model, "architecture", settings.architecture)
    quantization = quantization_of(settings)
    if quantization is not None:
        from llama_jax.formats.streaming import abstract_quantized

        params = abstract_quantized(config, params, quantization)
    return config, params, tokenizer


def draft_of(settings: Settings, model: Runnable) -> Runnable | None:
    """The model that guesses for `model`, as shape structs in the form in which it runs. Raises
    ValueError for one that cannot, as far as tokenizers or vocabularies tell."""
    if settings.draft_model is None:
        return None
    config, params, tokenizer = _shape_of(
        settings.draft_model, "draft_architecture", settings.draft_architecture
    )
    known = model.tokenizer is not None and tokenizer is not None
    ours, theirs = (model.tokenizer, tokenizer) if known else (None, None)
    check_draft(model.config, ours, config, theirs)
    assert model.mesh is not None
    params = everywhere(model.mesh, jax.eval_shape(for_decoding, params))
    return dataclasses.replace(
        model, config=config, params=params, compute=undivided(model.compute), tokenizer=tokenizer
    )


def _shape_of(model: str, setting: str, architecture: str | None) -> Shape:
    if architecture is not None:
        config = preset(architecture, field=setting)
        return config, abstract_params(config), None
    from llama_jax.load import load_abstract

    loaded = load_abstract(model)
    return loaded.config, loaded.params, loaded.tokenizer
