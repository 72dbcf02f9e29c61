"""Several processes that serve the same models together, each with a part of every engine.

Process 0 decides what is loaded and unloaded, as alone. The others read the same files where they
are told to, and where one cannot, none has the engine.
"""

import contextlib
import hashlib
import itertools
import json
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from infer.engine.agreement import STUCK_SECONDS, Agreement
from infer.engine.following import BUILD, Following
from infer.engine.hosts import EngineFollowers, Followers, Leader
from infer.registry import Registry
from infer.server.build import EngineMaker, built
from infer.server.loaded import Built, Source
from infer.server.settings import Settings
from infer.server.versions import Versions
from llama_jax.mesh.distributed import EXCHANGE_SECONDS, ProcessError, exchange
from llama_jax.paths import to_path

if TYPE_CHECKING:
    from infer.engine.engine import BatchingEngine
    from infer.engine.paged_runner import PagedRunner

# What the processes of one server must have been told alike: what their steps follow from.
_SHARED = (
    "models",
    "models_dir",
    "verify_hashes",
    "architecture",
    "slice",
    "mesh",
    "dtype",
    "cache_dtype",
    "quantization",
    "cache",
    "cache_tokens",
    "block_size",
    "max_slots",
    "max_context",
    "piece_tokens",
    "max_adapters",
    "max_lora_rank",
    "draft_tokens",
    "draft_model",
    "exact",
)
_MEETING = "serve"


class Group:
    """Process 0's side; JAX has started. give_up: see `hosts.Followers`; called after the requests
    of all engines have heard of it. Raises ValueError for settings that cannot be or that differ
    between processes, ProcessError where the others do not come."""

    def __init__(self, settings: Settings, give_up: Callable[[str], None]):
        self._parts = _Parts(settings)
        self._give_up = give_up
        self._numbers = itertools.count()
        self._adding = threading.Lock()
        self._engines: weakref.WeakSet[BatchingEngine] = weakref.WeakSet()
        self._followers = Followers(_MEETING, self._lost)

    def build(self, source: Source) -> Built:
        """As `loaded.Build`, in all processes. Raises what a load raises, ElsewhereError for one
        that failed in another process."""
        followers = EngineFollowers(self._followers, next(self._numbers))
        try:
            engine, model = self._make(source, followers)
        except ProcessError as error:
            followers.give_up(str(error))
            raise
        with self._adding:
            self._engines.add(engine)
        return built(engine, model)

    def _make(self, source: Source, followers: EngineFollowers) -> tuple["BatchingEngine", Any]:
        apart = not self._parts.needs_devices(source)
        with contextlib.ExitStack() as order:
            order.enter_context(followers.told(BUILD, source.name, source.version, apart))
            if apart:
                order.close()
            with followers.agreement.in_all(EXCHANGE_SECONDS if apart else STUCK_SECONDS):
                return self._parts.make(lambda: source, followers.agreement, followers=followers)

    def close(self) -> None:
        """Lets the others end."""
        self._followers.close()

    def _lost(self, message: str) -> None:
        with self._adding:
            engines = list(self._engines)
        for engine in engines:
            engine.give_up(message)
        self._give_up(message)


def follow(settings: Settings, sources: list[Source]) -> None:
    """What a process other than 0 does in place of serving, until that one ends; JAX has started.

    Raises HostLostError when that one is gone, ValueError as `Group`.
    """
    parts, leader = _Parts(settings), Leader(_MEETING)
    root = settings.models_dir
    versions = Versions(sources, None if root is None else Registry(root))

    def build(agreement: Agreement, name: str, version: str) -> "PagedRunner":
        def source() -> Source:
            return versions.source((name, version), hashes=settings.verify_hashes, adapters=())

        return parts.make(source, agreement)[0].part()

    Following(build).run(leader)


class _Parts:
    """Makes this process's part of engines. Raises ValueError as `Group`."""

    def __init__(self, settings: Settings):
        from infer.engine import placement

        self._settings = settings
        self._maker = EngineMaker(settings)
        self._maker.check_devices()
        assert self._maker.sizes is not None
        _agree(settings)
        self._mesh = placement.serving_mesh(self._maker.sizes)
        self._drafting = threading.Lock()

    def needs_devices(self, source: Source) -> bool:
        """Whether the processes compute together, or orbax has them meet on the devices, while the
        source is read, so that no engine may run meanwhile."""
        from llama_jax.formats.checkpoint import is_checkpoint
        from llama_jax.load import find_model

        path = to_path(source.model)
        is_read_by_orbax = path.is_dir() and is_checkpoint(find_model(path))
        return is_read_by_orbax or bool(source.adapter or self._maker.quantization)

    def make(
        self,
        find: Callable[[], Source],
        agreement: Agreement,
        *,
        followers: EngineFollowers | None = None,
    ) -> tuple["BatchingEngine", Any]:
        """An engine, and its model. find: the source, whose files are whole then. To be called
        in `agreement.in_all`: the processes meet inside."""
        source = find()
        contents = agreement.exchange(self._contents(source))
        if contents[0] != self._contents(source):
            raise ValueError(
                f"the manifest of {source.name} version {source.version} is another than that of "
                f"process 0; a registry must be the same on all hosts"
            )
        # A draft model guesses in process 0 alone, but the room it takes is counted everywhere.
        with self._drafting:
            draft = self._maker.draft
        model = self._maker.load(source, self._mesh)
        engine = self._maker.engine(
            source, model, self._mesh, draft=draft, followers=followers, agreement=agreement
        )
        return engine, model

    def _contents(self, source: Source) -> str:
        """What tells versions of a registry apart; empty for what is given at the start."""
        root = self._settings.models_dir
        if root is None or source.name not in Registry(root).names():
            return ""
        manifest = Registry(root).manifest(source.name, source.version)
        return hashlib.sha256(json.dumps(asdict(manifest)).encode()).hexdigest()


def _agree(settings: Settings) -> None:
    """Raises ValueError where other processes were told something else."""
    own = {name: getattr(settings, name) for name in _SHARED}
    told = [json.loads(each) for each in exchange("settings", json.dumps(own))]
    for name in _SHARED:
        if any(each[name] != told[0][name] for each in told):
            values = ", ".join(
                f"{each[name]!r} in process {number}" for number, each in enumerate(told)
            )
            raise ValueError(f"the processes of a server need the same {name}, but it is {values}")
