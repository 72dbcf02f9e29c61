"""The versions in memory: loading them, making room for them, unloading them.

All methods run on the server's event loop; what blocks runs in threads.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from infer.registry import State, UnknownNameError
from infer.server.errors import ApiError, shutting_down
from infer.server.loaded import Build, Key, Loaded, Source, bring_back, probe
from infer.server.settings import Settings
from infer.server.versions import Versions

logger = logging.getLogger(__name__)


class Loader:
    """See the module. loaded: what is in memory."""

    def __init__(
        self, settings: Settings, build: Build, versions: Versions, clock: Callable[[], float]
    ):
        self._settings, self._build, self._versions = settings, build, versions
        self._clock = clock
        self.loaded: dict[Key, Loaded] = {}
        self._loading: dict[Key, asyncio.Task[Loaded]] = {}
        # The version that is to answer; nothing unloads it.
        self._kept: Key | None = None
        # Versions that have been given room and are not loaded yet.
        self._building: set[Key] = set()
        # Beside versions that were put away, which come back when they are asked for.
        self._adapters_away: dict[Key, tuple[str, ...]] = {}
        self._making_room = asyncio.Lock()
        self._is_stopping = False

    def is_loading(self, key: Key) -> bool:
        return key in self._loading

    # Into memory

    async def load(self, key: Key, switch: State | None = None) -> Loaded:
        """The loaded version; callers that come together wait for one load. Raises ApiError.

        switch: the state it is loaded for, where it is to answer.
        """
        if self._is_stopping:
            raise shutting_down()
        if key in self.loaded:
            return self.loaded[key]
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
            await asyncio.to_thread(self._versions.readable_state, name)
            self._in_the_way(key, switch)
            # Files that are damaged are no reason to unload anything.
            source = await asyncio.to_thread(self._source, key)
            await self._make_room(key, switch)
            loaded = await asyncio.to_thread(self._build_version, source)
            loaded.last_used = self._clock()
            self.loaded[key] = loaded
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

    def _source(self, key: Key) -> Source:
        away = self._adapters_away.get(key, ())
        return self._versions.source(key, hashes=self._settings.verify_hashes, adapters=away)

    def _build_version(self, source: Source) -> Loaded:
        """In a thread: from files to an engine that has answered."""
        is_given = source.name in self._versions.given
        built = self._build(source)
        try:
            built.engine.start()
            if is_given:
                for adapter, folder in source.adapters.items():
                    built.engine.add_adapter(adapter, str(folder))
                adapters = dict(source.adapters)
            else:
                adapters = bring_back(built.engine, source, source.adapters)
            probe(built.engine, built.tokenizer)
        except BaseException:
            built.engine.stop(0)
            raise
        return Loaded(source, built.engine, built.tokenizer, is_given, adapters, built.quantization)

    # Room

    @contextmanager
    def keeping(self, key: Key) -> Iterator[None]:
        """Inside, the version is not unloaded for others, however long nobody uses it."""
        self._kept = key
        try:
            yield
        finally:
            self._kept = None

    async def _make_room(self, key: Key, switch: State | None) -> None:
        """Unloads the version unused for longest when as many are loaded as may be."""
        async with self._making_room:
            while (loaded := self._in_the_way(key, switch)) is not None:
                await self.put_away(loaded)
            self._building.add(key)

    def _in_the_way(self, key: Key, switch: State | None) -> Loaded | None:
        """What must be unloaded before a version is loaded. Raises ApiError where all is in use.

        A version that answers is not unloaded for one that is to answer, nor where no request
        would load it again. One that takes the place of another is loaded beside it, one more
        than may be; the other is unloaded when nobody uses it any more.
        """
        name, version = key
        count, most = len(self.loaded) + len(self._building), self._settings.max_loaded
        if count < most:
            return None
        keeps = switch is not None or not self._settings.load_on_demand
        idle = self.idle(but_answering=keeps)
        if idle:
            return idle[0]
        replaced = (name, self._versions.remembered_state(name).active)
        is_replacing = switch is not None and switch.canary is None and replaced in self.loaded
        if is_replacing and count == most:
            return None
        raise ApiError(
            503,
            f"there is no room for {name} version {version}: {len(self.loaded)} versions are "
            f"loaded and in use, {len(self._building)} are being loaded, and max_loaded is "
            f"{self._settings.max_loaded}; unload one, or raise it",
            code="no_room",
            retry_after_seconds=10,
        )

    def idle(self, *, but_answering: bool) -> list[Loaded]:
        """The versions that may be unloaded, that unused for longest first."""
        idle = [
            each
            for each in self.loaded.values()
            if self.may_go(each) and not (but_answering and self._answers(each))
        ]
        return sorted(idle, key=lambda each: each.last_used)

    def may_go(self, loaded: Loaded) -> bool:
        key = (loaded.name, loaded.version)
        return not loaded.is_pinned and not loaded.in_use and key != self._kept

    def _answers(self, loaded: Loaded) -> bool:
        state = self._versions.remembered_state(loaded.name)
        return loaded.version in (state.active, state.canary)

    # Out of memory

    async def put_away(self, loaded: Loaded) -> None:
        """Unloads a version that nobody uses now and nobody said to unload."""
        self._adapters_away[loaded.name, loaded.version] = tuple(loaded.adapters)
        await self._unload(loaded, 0)

    async def unload(self, loaded: Loaded) -> None:
        """Because somebody said so: waits for its running requests, and forgets its adapters."""
        await self._unload(loaded, self._settings.drain_seconds)
        self._adapters_away.pop((loaded.name, loaded.version), None)

    async def _unload(self, loaded: Loaded, drain_seconds: float) -> None:
        self.loaded.pop((loaded.name, loaded.version), None)
        await asyncio.to_thread(loaded.engine.stop, drain_seconds)
        extra = {"model": loaded.name, "version": loaded.version}
        logger.info("version unloaded", extra=extra)

    async def stop(self, drain_seconds: float) -> None:
        self._is_stopping = True
        for task in self._loading.values():
            task.cancel()
        engines = [loaded.engine for loaded in self.loaded.values()]
        await asyncio.gather(*(asyncio.to_thread(each.stop, drain_seconds) for each in engines))
        self.loaded.clear()
