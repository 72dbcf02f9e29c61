"""The models of a running server: which are loaded, which version answers, what replaces what.

Every loaded version has an engine of its own. All methods run on the server's event loop; what
blocks runs in threads. A request holds a `Lease` on one loaded version from before its first token
to after its last, so an answer never mixes versions and a version in use is never unloaded.
"""

import asyncio
import functools
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from infer.registry import Registry, State, UnknownNameError
from infer.server.errors import ApiError
from infer.server.loaded import Build, Key, Lease, Loaded, Source, probe, start_again
from infer.server.settings import Settings
from llama_jax.formats.json_fields import read_text

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 60.0


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
        self._settings, self._build, self._registry = settings, build, registry
        self._sources = {source.name: source for source in sources}
        if registry is not None:
            both = set(self._sources) & set(registry.names())
            if both:
                raise ValueError(
                    f"the model {min(both)} is given and in the registry too; name the given one "
                    f"otherwise: NAME=MODEL"
                )
        self._clock = clock
        self._loaded: dict[Key, Loaded] = {}
        self._loading: dict[Key, asyncio.Task[Loaded]] = {}
        self._restarting: dict[Key, asyncio.Task[None]] = {}
        # The states of models whose registry must not be asked for every request.
        self._states: dict[str, State] = {}
        self._changing = asyncio.Lock()
        # The version that is to answer; nothing unloads it.
        self._switching: Key | None = None
        # Versions that have been given room and are not loaded yet.
        self._building: set[Key] = set()
        # Beside versions that were put away, which come back when they are asked for.
        self._adapters_away: dict[Key, tuple[str, ...]] = {}
        self._making_room = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self.is_draining = False
        self.has_started = False
        self.on_restart: Callable[[Loaded], None] = lambda loaded: None

    # Start and end

    async def start(self) -> None:
        """Loads what was given at the start. Raises what loading raises."""
        self._watcher = asyncio.create_task(self._watch())
        for source in self._sources.values():
            await self._load((source.name, source.version))
        self.has_started = True

    @property
    def is_ready(self) -> bool:
        started = self.has_started and not self.is_draining
        given = [(source.name, source.version) for source in self._sources.values()]
        return started and all(
            key in self._loaded
            and key not in self._restarting
            and self._loaded[key].engine.state == "ready"
            for key in given
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
        if self._watcher is not None:
            self._watcher.cancel()
        for task in self._loading.values():
            task.cancel()
        engines = [loaded.engine for loaded in self._loaded.values()]
        await asyncio.gather(*(asyncio.to_thread(each.stop, drain_seconds) for each in engines))
        self._loaded.clear()

    # For requests

    async def lease(self, model: str, request_id: str) -> Lease:
        """The loaded version that answers a request. Raises ApiError.

        model: NAME, NAME@VERSION, and either with :ADAPTER behind it.
        """
        if self.is_draining:
            raise ApiError(
                503, "the server is shutting down", code="shutting_down", retry_after_seconds=5
            )
        rest, _, adapter = model.partition(":")
        name, _, version = rest.partition("@")
        if rest.endswith("@") or model.endswith(":"):
            raise _unknown(model, f"there is no model {model!r}: nothing follows its @ or :")
        if not version:
            unreadable = f"which version of {name} is active cannot be read"
            with _without_reason("registry_damaged", unreadable):
                if name not in self._sources and name not in self._states:
                    # The registry may lie on a slow disk; its answer is remembered.
                    await asyncio.to_thread(self._state, name, model)
                version = self._choose(name, model, request_id)
        key = (name, version)
        loaded = self._loaded.get(key)
        if loaded is None:
            loaded = await self._load_for_request(key, model)
        if loaded.engine.state == "starting" or key in self._restarting:
            raise _not_ready(name)
        if adapter and adapter not in loaded.adapters:
            raise _unknown(model, f"no adapter {adapter!r} is loaded beside {name}")
        return Lease(loaded, adapter or None)

    @contextmanager
    def use(self, lease: Lease) -> Iterator[None]:
        lease.loaded.in_use += 1
        try:
            yield
        finally:
            lease.loaded.in_use -= 1
            lease.loaded.last_used = self._clock()

    def _choose(self, name: str, model: str, request_id: str) -> str:
        if name not in self._sources:
            state = self._state(name, model)
            if state.canary is not None and _share_of(request_id) < state.share:
                return state.canary
        return self._active(name, model)

    def _active(self, name: str, model: str) -> str:
        if name in self._sources:
            return self._sources[name].version
        state = self._state(name, model)
        if state.active is None:
            raise _unknown(model, f"no version of {name} is active")
        return state.active

    def _state(self, name: str, model: str) -> State:
        if name not in self._states:
            versions = self._versions(name)
            if self._registry is None or not versions:
                raise _unknown(model, f"there is no model {model[:100]!r}")
            try:
                state = self._registry.state(name)
            except ValueError as error:
                logger.error("state not read", extra={"model": name, "reason": str(error)})
                raise ApiError(503, str(error), code="registry_damaged") from error
            if state.canary not in (None, *versions):
                extra = {"model": name, "version": state.canary}
                logger.warning("canary ignored; the version is not there", extra=extra)
                state = replace(state, canary=None, share=0.0)
            # Not what a switch has set meanwhile.
            self._states.setdefault(name, state)
        return self._states[name]

    async def _load_for_request(self, key: Key, model: str) -> Loaded:
        name, version = key
        if name in self._sources:
            if version != self._sources[name].version:
                raise _unknown(model, f"{name} has the version {self._sources[name].version} only")
            raise _not_ready(name)
        if version not in await asyncio.to_thread(self._versions, name):
            raise _unknown(model, f"there is no model {model[:100]!r}")
        if not self._settings.load_on_demand:
            raise ApiError(503, f"{name} version {version} is not loaded", code="model_not_loaded")
        with _without_reason("load_failed", f"{name} version {version} cannot be loaded"):
            return await self._load(key)

    # What there is

    def catalog(self) -> list[dict[str, Any]]:
        """The entries of /v1/models: what a request may name, with the active version. Reads the
        registry, so it may take a while."""
        entries = []
        names = [*self._sources, *(self._registry.names() if self._registry else [])]
        for name in names:
            given = self._sources.get(name)
            version = self._known_state(name).active if given is None else given.version
            loaded = None if version is None else self._loaded.get((name, version))
            entry: dict[str, Any] = {
                "id": name,
                "object": "model",
                "created": 0 if loaded is None else loaded.source.created,
                "owned_by": "llama-jax",
                "version": version,
                "loaded": loaded is not None,
                "max_model_len": None if loaded is None else loaded.engine.max_context,
            }
            entries.append(entry)
            if loaded is not None:
                entries += [
                    {**entry, "id": f"{name}:{adapter}", "parent": name}
                    for adapter in sorted(loaded.adapters)
                ]
        return entries

    def report(self) -> list[dict[str, Any]]:
        """For admins: every version of every model and where it stands."""
        rows = []
        for name in [*self._sources, *(self._registry.names() if self._registry else [])]:
            given = self._sources.get(name)
            state = State(active=given.version) if given else self._known_state(name)
            versions = [given.version] if given else self._versions(name)
            rows.append(
                {
                    "name": name,
                    "active": state.active,
                    "previous": list(state.previous),
                    "canary": state.canary,
                    "share": state.share,
                    "versions": [self._version_report(name, version) for version in versions],
                }
            )
        return rows

    def _known_state(self, name: str) -> State:
        """None active where it cannot be read: one damaged model must not hide the others."""
        try:
            return self._state(name, name)
        except ApiError:
            return State()

    def _versions(self, name: str) -> list[str]:
        return [] if self._registry is None else self._registry.versions(name)

    def _version_report(self, name: str, version: str) -> dict[str, Any]:
        key = (name, version)
        loaded = self._loaded.get(key)
        state = "unloaded" if key not in self._loading else "loading"
        if loaded is not None:
            state = "restarting" if key in self._restarting else loaded.engine.state
        row: dict[str, Any] = {"version": version, "state": state, "in_use": 0, "adapters": []}
        if loaded is not None:
            row |= {"in_use": loaded.in_use, "adapters": sorted(loaded.adapters)}
            row |= {"max_model_len": loaded.engine.max_context}
            row |= {"quantization": loaded.quantization}
        return row

    def statistics(self) -> list[tuple[str, str, Mapping[str, float]]]:
        return [
            (each.name, each.version, each.engine.statistics())
            for each in list(self._loaded.values())
        ]

    # For admins

    async def load(self, name: str, version: str) -> Loaded:
        """Loads a version without sending requests to it. Raises ApiError."""
        self._registered(name, version)
        return await self._load((name, version))

    async def activate(self, name: str, version: str, share: float | None) -> State:
        """Lets a version answer: all requests, or `share` of them beside the active one.

        It is loaded and has answered a probe before anything changes; until then, and where that
        fails, the version before answers. A state that is damaged is written anew. Raises ApiError
        with the reason.
        """
        self._registered(name, version)
        self._check_switchable(name)
        async with self._changing:
            state = await asyncio.to_thread(self._known_state, name)
            if share is not None and share < 1:
                if version == state.active or state.active is None:
                    raise ApiError(
                        409, f"a canary needs another active version than {version}", param="share"
                    )
                new = replace(state, canary=version, share=share)
            else:
                previous = state.previous
                if state.active is not None and state.active != version:
                    previous = (*(each for each in previous if each != version), state.active)
                new = State(active=version, previous=previous)
            return await self._switch(name, version, new)

    async def roll_back(self, name: str) -> State:
        """Ends a canary if there is one; else the version that answered before answers again."""
        self._check_switchable(name)
        async with self._changing:
            state = self._state(name, name)
            if state.canary is not None:
                return await self._set_state(name, replace(state, canary=None, share=0.0))
            if not state.previous:
                raise ApiError(409, f"no version of {name} was active before {state.active}")
            new = State(active=state.previous[-1], previous=state.previous[:-1])
            return await self._switch(name, state.previous[-1], new)

    async def unload(self, name: str, version: str) -> None:
        """Waits for the version's running requests. Raises ApiError for one that answers."""
        loaded = self._loaded.get((name, version))
        if loaded is None:
            self._registered(name, version)
            raise ApiError(409, f"{name} version {version} is not loaded")
        if loaded.is_pinned:
            raise ApiError(409, f"{name} was given at the start and stays loaded")
        await self._unload(loaded, self._settings.drain_seconds)
        self._adapters_away.pop((name, version), None)

    async def add_adapter(self, name: str, version: str, adapter: str) -> None:
        """Loads an adapter that the registry knows beside a loaded version. Raises ApiError."""
        loaded = self._loaded_version(name, version)
        known = self._known_adapters(loaded)
        if adapter not in known:
            raise _unknown(f"{name}:{adapter}", f"{name} has no adapter {adapter[:100]!r}")
        if adapter in loaded.adapters:
            raise ApiError(409, f"the adapter {adapter} is loaded")
        try:
            await asyncio.to_thread(loaded.engine.add_adapter, adapter, str(known[adapter]))
        except ValueError as error:
            raise ApiError(409, f"{adapter} cannot be loaded: {error}") from error
        loaded.adapters[adapter] = known[adapter]

    async def remove_adapter(self, name: str, version: str, adapter: str) -> None:
        loaded = self._loaded_version(name, version)
        if adapter not in loaded.adapters:
            raise _unknown(f"{name}:{adapter}", f"no adapter {adapter[:100]!r} is loaded")
        del loaded.adapters[adapter]
        await asyncio.to_thread(loaded.engine.remove_adapter, adapter)

    def active_version(self, name: str) -> str:
        return self._active(name, name)

    def _known_adapters(self, loaded: Loaded) -> Mapping[str, Path]:
        if loaded.name in self._sources or self._registry is None:
            return loaded.source.adapters
        return self._registry.adapters(loaded.name)

    def _loaded_version(self, name: str, version: str) -> Loaded:
        loaded = self._loaded.get((name, version))
        if loaded is None:
            self._registered(name, version)
            raise ApiError(409, f"{name} version {version} is not loaded")
        return loaded

    def _registered(self, name: str, version: str) -> None:
        """Raises ApiError 404 unless the version is known."""
        given = self._sources.get(name)
        if given is not None and given.version == version:
            return
        if self._registry is None or version not in self._registry.versions(name):
            raise _unknown(name, f"there is no version {version[:100]!r} of {name[:100]!r}")

    def _check_switchable(self, name: str) -> None:
        if name in self._sources:
            raise ApiError(409, f"{name} was given at the start and has one version only")

    async def _switch(self, name: str, version: str, state: State) -> State:
        self._switching = (name, version)
        try:
            await self._load(self._switching, state)
            return await self._set_state(name, state)
        finally:
            self._switching = None

    async def _set_state(self, name: str, state: State) -> State:
        assert self._registry is not None
        try:
            await asyncio.to_thread(self._registry.set_state, name, state)
        except (OSError, UnknownNameError) as error:
            logger.error("state not written", extra={"model": name, "reason": str(error)})
            message = f"which version of {name} is active stays as it was: {error}"
            raise ApiError(503, message, code="state_not_written") from error
        self._states[name] = state
        return state

    # Loading

    async def _load(self, key: Key, switch: State | None = None) -> Loaded:
        """The loaded version; callers that come together wait for one load. Raises ApiError.

        switch: the state it is loaded for, where it is to answer.
        """
        if key in self._loaded:
            return self._loaded[key]
        if key not in self._loading:
            task = asyncio.create_task(self._load_alone(key, switch))
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        # Who waits may give up; the load goes on for the others.
        return await asyncio.shield(self._loading[key])

    async def _load_alone(self, key: Key, switch: State | None) -> Loaded:
        name, version = key
        begin = time.monotonic()
        try:
            await asyncio.to_thread(self._known_state, name)
            self._in_the_way(key, switch)
            # Files that are damaged are no reason to unload anything.
            source = await asyncio.to_thread(self._source, key)
            await self._make_room(key, switch)
            loaded = await asyncio.to_thread(self._build_version, source)
            loaded.last_used = self._clock()
            self._loaded[key] = loaded
        except (ValueError, OSError, RuntimeError, UnknownNameError) as error:
            extra = {"model": name, "version": version, "reason": str(error)}
            logger.error("version not loaded", extra=extra)
            reason = f"{name} version {version} cannot be loaded: {error}"
            raise ApiError(503, reason, code="load_failed") from error
        finally:
            self._building.discard(key)
        seconds = round(time.monotonic() - begin, 3)
        logger.info("version loaded", extra={"model": name, "version": version, "seconds": seconds})
        return loaded

    def _build_version(self, source: Source) -> Loaded:
        """In a thread: from files to an engine that has answered."""
        built = self._build(source)
        try:
            built.engine.start()
            for adapter, folder in source.adapters.items():
                built.engine.add_adapter(adapter, str(folder))
            probe(built.engine, built.tokenizer)
        except BaseException:
            built.engine.stop(0)
            raise
        is_pinned = source.name in self._sources
        return Loaded(
            source,
            built.engine,
            built.tokenizer,
            is_pinned,
            dict(source.adapters),
            built.quantization,
        )

    def _source(self, key: Key) -> Source:
        name, version = key
        if name in self._sources:
            return self._sources[name]
        assert self._registry is not None
        manifest = self._registry.verify(name, version, hashes=self._settings.verify_hashes)
        folder = self._registry.folder(name, version)
        template = manifest.template
        known = self._registry.adapters(name)
        away = self._adapters_away.get(key, ())
        return Source(
            name=name,
            version=version,
            model=folder / manifest.model,
            adapter=None if manifest.adapter is None else folder / manifest.adapter,
            template=None if template is None else read_text(folder / template),
            adapters={adapter: known[adapter] for adapter in away if adapter in known},
            created=manifest.created,
        )

    async def _make_room(self, key: Key, switch: State | None) -> None:
        """Unloads the version unused for longest when as many are loaded as may be."""
        async with self._making_room:
            while (loaded := self._in_the_way(key, switch)) is not None:
                await self._put_away(loaded)
            self._building.add(key)

    def _in_the_way(self, key: Key, switch: State | None) -> Loaded | None:
        """What must be unloaded before a version is loaded. Raises ApiError where all is in use.

        A version that answers is not unloaded for one that is to answer, nor where no request
        would load it again. One that takes the place of another is loaded beside it, one more
        than may be; the other is unloaded when nobody uses it any more.
        """
        name, version = key
        count, most = len(self._loaded) + len(self._building), self._settings.max_loaded
        if count < most:
            return None
        keeps = switch is not None or not self._settings.load_on_demand
        idle = self._idle(but_answering=keeps)
        if idle:
            return idle[0]
        replaced = (name, self._states.get(name, State()).active)
        is_replacing = switch is not None and switch.canary is None and replaced in self._loaded
        if is_replacing and count == most:
            return None
        raise ApiError(
            503,
            f"there is no room for {name} version {version}: {len(self._loaded)} versions are "
            f"loaded and in use, {len(self._building)} are being loaded, and max_loaded is "
            f"{self._settings.max_loaded}; unload one, or raise it",
            code="no_room",
            retry_after_seconds=10,
        )

    def _idle(self, *, but_answering: bool) -> list[Loaded]:
        """The versions that may be unloaded, that unused for longest first."""
        idle = [
            each
            for each in self._loaded.values()
            if not each.is_pinned
            and not each.in_use
            and (each.name, each.version) != self._switching
            and not (but_answering and self._answers(each))
        ]
        return sorted(idle, key=lambda each: each.last_used)

    def _answers(self, loaded: Loaded) -> bool:
        state = self._states.get(loaded.name, State())
        return loaded.version in (state.active, state.canary)

    async def _put_away(self, loaded: Loaded) -> None:
        """Unloads a version that nobody uses now and nobody said to unload."""
        self._adapters_away[loaded.name, loaded.version] = tuple(loaded.adapters)
        await self._unload(loaded, 0)

    async def _unload(self, loaded: Loaded, drain_seconds: float) -> None:
        self._loaded.pop((loaded.name, loaded.version), None)
        await asyncio.to_thread(loaded.engine.stop, drain_seconds)
        extra = {"model": loaded.name, "version": loaded.version}
        logger.info("version unloaded", extra=extra)

    # Watching

    async def _watch(self) -> None:
        """Starts broken engines again and unloads versions that nobody uses."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for key, loaded in list(self._loaded.items()):
                if loaded.engine.state == "broken" and key not in self._restarting:
                    task = asyncio.create_task(self._restart(key, loaded))
                    self._restarting[key] = task
                    task.add_done_callback(functools.partial(self._restarted, key))
                elif self._is_idle(loaded):
                    await self._put_away(loaded)
            # What a switch has replaced.
            if len(self._loaded) > self._settings.max_loaded:
                for loaded in self._idle(but_answering=True)[:1]:
                    await self._put_away(loaded)

    def _restarted(self, key: Key, task: asyncio.Task[None]) -> None:
        self._restarting.pop(key, None)

    def _is_idle(self, loaded: Loaded) -> bool:
        limit = self._settings.idle_unload_seconds
        if limit is None or loaded.is_pinned or loaded.in_use:
            return False
        return self._clock() - loaded.last_used > limit

    async def _restart(self, key: Key, broken: Loaded) -> None:
        extra = {"model": broken.name, "version": broken.version}
        logger.error("engine broke; it is started again", extra=extra)
        self.on_restart(broken)
        wait = 1.0
        while key in self._loaded:
            try:
                await asyncio.to_thread(start_again, broken)
            except (ValueError, OSError, RuntimeError) as error:
                logger.error("engine did not start", extra=extra, exc_info=error)
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_BACKOFF_SECONDS)
            else:
                logger.info("engine started again", extra=extra)
                return


@contextmanager
def _without_reason(code: str, message: str) -> Iterator[None]:
    """For clients: a reason names files, which are for the log and for admins."""
    try:
        yield
    except ApiError as error:
        if error.code != code:
            raise
        raise ApiError(503, message, code=code) from error


def _share_of(request_id: str) -> float:
    """A number in [0, 1) that the same request id always gets."""
    return zlib.crc32(request_id.encode()) / 2**32


def _unknown(model: str, message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")


def _not_ready(name: str) -> ApiError:
    return ApiError(
        503, f"{name} is starting; ask again", code="model_not_ready", retry_after_seconds=2
    )
