"""From a source to an engine: the only file of the server that knows the engine's class.

JAX is imported by the first load, in its thread, so that the server listens at once.
"""

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.engine.options import EngineOptions, cache_named, parse_mesh
from infer.engine.request import Engine
from infer.registry import NAME
from infer.server.loaded import COMMAND_LINE_VERSION, Build, Built, Source
from infer.server.settings import Settings
from llama_jax.config import Compute
from llama_jax.model_name import check_model_name
from llama_jax.paths import to_path

if TYPE_CHECKING:
    from infer.engine.engine import BatchingEngine
    from llama_jax.weights.quantize import Quantization


def engine_options(settings: Settings) -> EngineOptions:
    """Raises ValueError."""
    options = EngineOptions(
        max_slots=settings.max_slots,
        max_context=settings.max_context,
        block_size=settings.block_size,
        piece_tokens=settings.piece_tokens,
        cache=cache_named(settings.cache),
        queue_limit=settings.queue_limit,
        max_adapters=settings.max_adapters,
        max_lora_rank=settings.max_lora_rank,
        draft_tokens=settings.draft_tokens,
        exact=settings.exact,
    )
    if settings.cache_tokens is None:
        return options
    return replace(options, num_blocks=-(-settings.cache_tokens // options.block_size))


def make_build(settings: Settings, start: Callable[[], None] = lambda: None) -> Build:
    """What loads a source and makes its engine. Raises ValueError for settings that cannot be.

    start: called once, before JAX is.
    """
    maker = EngineMaker(settings)
    lock = threading.Lock()
    start_once = functools.cache(start)

    def build(source: Source) -> Built:
        with lock:
            start_once()
            draft = maker.draft
        from infer.engine import placement
        from infer.engine.replicas import Replicas

        maker.check_devices()
        meshes = [None] if maker.sizes is None else placement.serving_meshes(maker.sizes)
        engines: list[Engine] = []
        for mesh in meshes:
            model = maker.load(source, mesh)
            engines.append(maker.engine(source, model, mesh, draft=draft))
        return built(engines[0] if len(engines) == 1 else Replicas(engines), model)

    return build


def built(engine: Engine, model: Any) -> Built:
    from llama_jax.weights.quantize import stored_types

    return Built(engine, model.tokenizer, stored_types(model.params))


class EngineMaker:
    """Loads models and makes engines as settings say. Raises ValueError for what cannot be."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.options = engine_options(settings)
        if settings.draft_model is not None:
            check_model_name(settings.draft_model)
        self.compute = Compute(dtype=settings.dtype or "float32", cache_dtype=settings.cache_dtype)
        self.sizes = None if settings.mesh is None else parse_mesh(settings.mesh)
        self.quantization = quantization_of(settings)

    def check_devices(self) -> None:
        from infer.engine import placement

        if self.settings.slice is not None:
            placement.check_slice(self.settings.slice)
        placement.check_processes(self.sizes, self.options)

    @functools.cached_property
    def draft(self) -> Any:
        """Once for all versions, which share its weights, in the one form in which it runs."""
        if self.settings.draft_model is None:
            return None
        from infer.layers import with_layers
        from llama_jax.load import check_architecture, load

        named, draft = self.settings.draft_architecture, load(self.settings.draft_model)
        check_architecture(
            named, self.settings.draft_model, draft.config, field="draft_architecture"
        )
        return draft.config, with_layers(draft.params, "unrolled", None), draft.tokenizer

    def load(self, source: Source, mesh: Any) -> Any:
        from infer.engine import placement
        from llama_jax.load import check_architecture, load

        model = load(
            source.model,
            adapter=source.adapter,
            mesh=mesh,
            rules=placement.RULES,
            quantization=self.quantization,
        )
        named = self.settings.architecture
        check_architecture(named, source.model, model.config, field="architecture")
        from llama_jax.formats.chat import chat_template, check_templates

        if source.template is None:
            check_templates(model.tokenizer)
        elif model.tokenizer is not None:
            chat_template(model.tokenizer, source.template).check_safe()
        return model

    def engine(
        self,
        source: Source,
        model: Any,
        mesh: Any,
        *,
        draft: Any,
        followers: Any = None,
        agreement: Any = None,
    ) -> "BatchingEngine":
        from infer.engine.engine import BatchingEngine
        from infer.engine.memory import longest_context

        options = replace(self.options, model_version=f"{source.name}@{source.version}")
        if self.settings.models_dir is not None and options.max_context is not None:
            # One setting for many models, of which some were made for less.
            longest = longest_context(model.config)
            options = replace(options, max_context=min(options.max_context, longest))
        return BatchingEngine(
            model,
            options,
            compute=self.compute,
            mesh=mesh,
            draft=draft,
            followers=followers,
            agreement=agreement,
        )


def quantization_of(settings: Settings) -> "Quantization | None":
    """Raises ValueError for a scheme that is unknown, or that needs calibration."""
    if settings.quantization is None:
        return None
    from llama_jax.weights.quantize import Quantization

    return Quantization(settings.quantization)


def given_sources(settings: Settings) -> list[Source]:
    """The versions of the command line with their adapters. Raises ValueError."""
    sources: dict[str, Source] = {}
    for text in settings.models:
        name, separator, model = text.partition("=")
        if not separator:
            name, model = _name_of(text), text
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot be the name of a model; name it yourself: NAME={model}"
            )
        if name in sources:
            raise ValueError(f"two models are called {name}; name them yourself: NAME=MODEL")
        check_model_name(model)
        sources[name] = Source(name, COMMAND_LINE_VERSION, model, created=int(time.time()))
    for text in settings.adapters:
        model, adapter, folder = _adapter_of(text, list(sources))
        given = sources[model].adapters
        if adapter in given:
            raise ValueError(f"two adapters of {model} are called {adapter}")
        sources[model] = replace(sources[model], adapters={**given, adapter: folder})
    most = max((len(source.adapters) for source in sources.values()), default=0)
    if most > settings.max_adapters:
        raise ValueError(
            f"{most} adapters are given and max_adapters is {settings.max_adapters}; raise it"
        )
    return list(sources.values())


def _name_of(model: str) -> str:
    """The last part of a path or Hub id, without .gguf."""
    return to_path(model).name.removesuffix(".gguf")


def _adapter_of(text: str, models: list[str]) -> tuple[str, str, Path]:
    """Model, name and folder of NAME=FOLDER or MODEL:NAME=FOLDER."""
    name, separator, folder = text.partition("=")
    model, colon, adapter = name.rpartition(":")
    if not separator or not folder or not NAME.fullmatch(adapter):
        raise ValueError(f"adapters has {text!r}; it must be NAME=FOLDER or MODEL:NAME=FOLDER")
    if not colon:
        if len(models) != 1:
            raise ValueError(f"adapters has {text!r}; say of which model: MODEL:{text}")
        model = models[0]
    if model not in models:
        raise ValueError(f"adapters has {text!r}, but no model given is called {model!r}")
    path = to_path(folder)
    if not path.is_dir():
        raise ValueError(f"the adapter {adapter} is no folder: {path}")
    return model, adapter, path
