"""The models of a running server: its start and end, and what requests and admins ask of it.

Every loaded version has an engine of its own. All methods run on the server's event loop; what
blocks runs in threads. A request holds a `Lease` on one loaded version from before its first token
to after its last, so an answer never mixes versions and a version in use is never unloaded.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from infer.engine.request import NotReadyError
from infer.registry import Registry
from infer.server.errors import (
    ApiError,
    not_ready,
    shutting_down,
    unknown_model,
    without_reason,
)
from infer.server.loaded import Build, Key, Lease, Loaded, Source
from infer.server.loader import Loader
from infer.server.reports import Reports
from infer.server.settings import Settings
from infer.server.switches import Switches
from infer.server.versions import Versions
from infer.server.watcher import Watcher


class Models:
    """See the module. sources: the versions that must be there before the server is ready."""

    def __init__(
        self,
        settings: Settings,
        build: Build,
        sources: list[Source],
        registry: Registry | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._settings, self._clock = settings, clock
        self._versions = Versions(sources, registry)
        self._loader = Loader(settings, build, self._versions, clock)
        self.watcher = Watcher(settings, self._loader, clock)
        self.switches = Switches(self._versions, self._loader, self.watcher)
        self.reports = Reports(self._versions, self._loader, self.watcher)
        self.is_draining = False
        self.has_started = False

    # Start and end

    async def start(self) -> None:
        """Loads what was given at the start. Raises what loading raises."""
        self.watcher.start()
        for key in self._given_keys():
            await self._loader.load(key)
        self.has_started = True

    def _given_keys(self) -> list[Key]:
        return [(source.name, source.version) for source in self._versions.given.values()]

    @property
    def is_ready(self) -> bool:
        started = self.has_started and not self.is_draining
        return started and all(
            key in self._loader.loaded and self.watcher.state(self._loader.loaded[key]) == "ready"
            for key in self._given_keys()
        )

    @property
    def condition(self) -> str:
        if self.is_draining:
            return "draining"
        if not self.has_started:
            return "starting"
        return "ready" if self.is_ready else "restarting"

    async def stop(self, drain_seconds: float) -> None:
        self.is_draining = True
        self.watcher.stop()
        await self._loader.stop(drain_seconds)

    # For requests

    async def lease(self, model: str, request_id: str) -> Lease:
        """The loaded version that answers a request. Raises ApiError.

        model: NAME, NAME@VERSION, and either with :ADAPTER behind it.
        """
        if self.is_draining:
            raise shutting_down()
        rest, _, adapter = model.partition(":")
        name, _, version = rest.partition("@")
        if rest.endswith("@") or model.endswith(":"):
            raise unknown_model(f"there is no model {model!r}: nothing follows its @ or :")
        if not version:
            version = await self._versions.choose(name, model, request_id)
        key = (name, version)
        loaded = self._loader.loaded.get(key)
        if loaded is None:
            loaded = await self._load_for_request(key, model)
        if self.watcher.state(loaded) in ("starting", "restarting"):
            raise _starting(name)
        if adapter and adapter not in loaded.adapters:
            raise unknown_model(f"no adapter {adapter!r} is loaded beside {name}")
        return Lease(loaded, adapter or None)

    @contextmanager
    def use(self, lease: Lease) -> Iterator[None]:
        lease.loaded.in_use += 1
        try:
            yield
        finally:
            lease.loaded.in_use -= 1
            lease.loaded.last_used = self._clock()

    async def _load_for_request(self, key: Key, model: str) -> Loaded:
        name, version = key
        given = self._versions.given.get(name)
        if given is not None:
            if version != given.version:
                raise unknown_model(f"{name} has the version {given.version} only")
            raise _starting(name)
        if version not in await asyncio.to_thread(self._versions.of, name):
            raise unknown_model(f"there is no model {model[:100]!r}")
        if not self._settings.load_on_demand:
            raise ApiError(503, f"{name} version {version} is not loaded", code="model_not_loaded")
        with without_reason("load_failed", f"{name} version {version} cannot be loaded"):
            return await self._loader.load(key)

    # For admins, beside `switches`

    def active_version(self, name: str) -> str:
        """Raises ApiError."""
        return self._versions.active(name, name)

    async def load(self, name: str, version: str) -> Loaded:
        """Loads a version without sending requests to it. Raises ApiError."""
        self._versions.check(name, version)
        return await self._loader.load((name, version))

    async def unload(self, name: str, version: str) -> None:
        """Waits for the version's running requests. Raises ApiError for one that stays loaded."""
        loaded = self._loaded_version(name, version)
        if loaded.is_pinned:
            raise ApiError(409, f"{name} was given at the start and stays loaded")
        await self._loader.unload(loaded)

    async def add_adapter(self, name: str, version: str, adapter: str) -> None:
        """Loads an adapter that the registry knows beside a loaded version. Raises ApiError."""
        loaded = self._ready_version(name, version)
        known = self._versions.adapters(loaded)
        if adapter not in known:
            raise unknown_model(f"{name} has no adapter {adapter[:100]!r}")
        if adapter in loaded.adapters:
            raise ApiError(409, f"the adapter {adapter} is loaded")
        try:
            await asyncio.to_thread(loaded.engine.add_adapter, adapter, str(known[adapter]))
        except ValueError as error:
            raise ApiError(409, f"{adapter} cannot be loaded: {error}") from error
        except NotReadyError as error:
            raise not_ready(f"{adapter} is not loaded: {error}") from error
        loaded.adapters[adapter] = known[adapter]

    async def remove_adapter(self, name: str, version: str, adapter: str) -> None:
        """Waits for the running requests with it. Raises ApiError."""
        loaded = self._ready_version(name, version)
        if adapter not in loaded.adapters:
            raise unknown_model(f"no adapter {adapter[:100]!r} is loaded")
        folder = loaded.adapters.pop(adapter)
        try:
            await asyncio.to_thread(loaded.engine.remove_adapter, adapter)
        except NotReadyError as error:
            loaded.adapters[adapter] = folder
            raise not_ready(f"{adapter} is not unloaded: {error}") from error

    def _loaded_version(self, name: str, version: str) -> Loaded:
        loaded = self._loader.loaded.get((name, version))
        if loaded is None:
            self._versions.check(name, version)
            raise ApiError(409, f"{name} version {version} is not loaded")
        return loaded

    def _ready_version(self, name: str, version: str) -> Loaded:
        """Not one that is being started again, with the adapters that it had."""
        loaded = self._loaded_version(name, version)
        state = self.watcher.state(loaded)
        if state != "ready":
            raise not_ready(f"{name} version {version} is {state}; ask again")
        return loaded


def _starting(name: str) -> ApiError:
    return not_ready(f"{name} is starting; ask again")
