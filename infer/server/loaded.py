"""A version of a model: what it is made from, and what it is once it is in memory."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from infer.engine.request import Engine, Event, Failed, Finished, Request
from infer.params import SamplingParams
from infer.server.settings import PROBE

if TYPE_CHECKING:
    from llama_jax.formats.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Versions given on the command line have no registry to name them.
COMMAND_LINE_VERSION = "1"
PROBE_TOKENS = 4
PROBE_SECONDS = 120.0


@dataclass(frozen=True)
class Source:
    """What a version is made from. model: a MODEL of the command line or a path. template: the text
    that replaces the tokenizer's chat template. adapters: folders of those loaded with it."""

    name: str
    version: str
    model: str | Path
    adapter: Path | None = None
    template: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    created: int = 0


@dataclass(frozen=True)
class Built:
    """An engine that has not been started, the text side of its model, and how its weights are
    stored where they are quantized."""

    engine: Engine
    tokenizer: "Tokenizer | None"
    quantization: str | None = None


Build = Callable[[Source], Built]


@dataclass(eq=False)
class Loaded:
    """A version in memory. adapters: those that requests may name, with their folders."""

    source: Source
    engine: Engine
    tokenizer: "Tokenizer | None"
    is_pinned: bool
    adapters: dict[str, Path]
    quantization: str | None = None
    in_use: int = 0
    last_used: float = 0.0

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def version(self) -> str:
        return self.source.version

    @property
    def fingerprint(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Lease:
    loaded: Loaded
    adapter: str | None


Key = tuple[str, str]


def start_again(loaded: Loaded) -> None:
    """In a thread: the same weights and adapters, a fresh loop."""
    loaded.engine.stop(0)
    loaded.engine.start()
    loaded.adapters = bring_back(loaded.engine, loaded.source, loaded.adapters)
    probe(loaded.engine, loaded.tokenizer)


def bring_back(engine: Engine, source: Source, adapters: Mapping[str, Path]) -> dict[str, Path]:
    """Loads adapters that were loaded before, and gives those that still can be: one whose files
    were damaged since keeps no model from answering."""
    back = {}
    for adapter, folder in list(adapters.items()):
        try:
            engine.add_adapter(adapter, str(folder))
        except ValueError as error:
            extra = {"model": f"{source.name}:{adapter}", "version": source.version}
            logger.error("adapter not loaded again", extra={**extra, "reason": str(error)})
        else:
            back[adapter] = folder
    return back


def probe(engine: Engine, tokenizer: "Tokenizer | None") -> None:
    """Has the engine answer a few tokens. Raises RuntimeError when it does not."""
    first = None if tokenizer is None else tokenizer.bos_token_id
    ended = threading.Event()
    last: list[Event] = []

    def listen(event: Event) -> None:
        if isinstance(event, Failed | Finished):
            last.append(event)
            ended.set()

    request = Request(
        id="probe",
        prompt_token_ids=(0 if first is None else first,),
        params=SamplingParams(temperature=0.0, max_tokens=PROBE_TOKENS),
        tenant=PROBE,
    )
    engine.submit(request, listen)
    if not ended.wait(PROBE_SECONDS):
        raise RuntimeError(f"no answer to a probe within {PROBE_SECONDS:g} seconds")
    if isinstance(last[0], Failed):
        raise RuntimeError(f"the probe failed: {last[0].message}")
