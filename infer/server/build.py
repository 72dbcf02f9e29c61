"""From a source to an engine: the only file of the server that knows the engine's class."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.server.models import Build, Built, Source
from infer.server.settings import Settings
from llama_jax.config import Compute
from llama_jax.load import load


def engine_options(settings: Settings) -> EngineOptions:
    """Raises ValueError."""
    options = EngineOptions(
        max_slots=settings.max_slots,
        max_context=settings.max_context,
        queue_limit=settings.queue_limit,
    )
    if settings.cache_tokens is None:
        return options
    return replace(options, num_blocks=-(-settings.cache_tokens // options.block_size))


def make_build(settings: Settings) -> Build:
    """What loads a source and makes its engine. Raises ValueError for settings that cannot be."""
    options = engine_options(settings)
    compute = None if settings.dtype is None else Compute(dtype=settings.dtype)

    def build(source: Source) -> Built:
        model = load(source.model, adapter=source.adapter)
        if source.template is not None and model.tokenizer is not None:
            from llama_jax.formats.chat import chat_template

            chat_template(model.tokenizer, source.template)
        engine: Any = BatchingEngine(
            model,
            replace(options, model_version=f"{source.name}@{source.version}"),
            compute=compute,
        )
        return Built(engine, model.tokenizer)

    return build


def given_sources(models: tuple[str, ...]) -> list[Source]:
    """The versions of the command line, each MODEL or NAME=MODEL. Raises ValueError."""
    import time

    from infer.registry import NAME
    from infer.server.models import COMMAND_LINE_VERSION

    sources: dict[str, Source] = {}
    for text in models:
        name, separator, model = text.partition("=")
        if not separator:
            name, model = _name_of(text), text
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot be the name of a model; name it yourself: NAME={model}"
            )
        if name in sources:
            raise ValueError(f"two models are called {name}; name them yourself: NAME=MODEL")
        sources[name] = Source(name, COMMAND_LINE_VERSION, model, created=int(time.time()))
    return list(sources.values())


def _name_of(model: str) -> str:
    """The last part of a path or Hub id, without .gguf."""
    return Path(model).expanduser().name.removesuffix(".gguf")
