"""The watch over versions in memory: broken engines start again, unused versions are unloaded."""

import asyncio
import functools
import logging
from collections.abc import Callable

from infer.server.loaded import Loaded, start_again
from infer.server.loader import Loader
from infer.server.settings import Settings

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 60.0


class Watcher:
    """on_restart: called when an engine that broke is about to be started again."""

    def __init__(self, settings: Settings, loader: Loader, clock: Callable[[], float]):
        self._settings, self._loader, self._clock = settings, loader, clock
        self._restarting: dict[Loaded, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self.on_restart: Callable[[Loaded], None] = lambda loaded: None

    def start(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    def state(self, loaded: Loaded) -> str:
        """Where a version in memory stands: that of its engine, or `restarting`."""
        return "restarting" if loaded in self._restarting else loaded.engine.state

    async def _watch(self) -> None:
        loader = self._loader
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for key, loaded in list(loader.loaded.items()):
                if loader.loaded.get(key) is not loaded:
                    continue  # unloaded since the others were looked at
                if self.state(loaded) == "broken":
                    task = asyncio.create_task(self._restart(loaded))
                    self._restarting[loaded] = task
                    task.add_done_callback(functools.partial(self._restarted, loaded))
                elif self._is_idle(loaded):
                    await loader.put_away(loaded)
            # What a switch has replaced.
            if len(loader.loaded) > self._settings.max_loaded:
                for loaded in loader.idle(but_answering=True)[:1]:
                    await loader.put_away(loaded)

    def _is_idle(self, loaded: Loaded) -> bool:
        limit = self._settings.idle_unload_seconds
        if limit is None or not self._loader.may_go(loaded):
            return False
        return self._clock() - loaded.last_used > limit

    def _restarted(self, loaded: Loaded, task: asyncio.Task[None]) -> None:
        self._restarting.pop(loaded, None)

    async def _restart(self, broken: Loaded) -> None:
        """Until it is up, or has been unloaded; the version may be loaded anew meanwhile."""
        extra = {"model": broken.name, "version": broken.version}
        logger.error("engine broke; it is started again", extra=extra)
        self.on_restart(broken)
        wait = 1.0
        while self._is_loaded(broken):
            try:
                await asyncio.to_thread(start_again, broken)
            except (ValueError, OSError, RuntimeError) as error:
                logger.error("engine did not start", extra=extra, exc_info=error)
                await self._pause(broken, wait)
                wait = min(2 * wait, LONGEST_BACKOFF_SECONDS)
            else:
                logger.info("engine started again", extra=extra)
                break
        if not self._is_loaded(broken):
            await asyncio.to_thread(broken.engine.stop, 0)

    async def _pause(self, broken: Loaded, seconds: float) -> None:
        """Ends early when the version is unloaded: its weights are held here."""
        while seconds > 0 and self._is_loaded(broken):
            await asyncio.sleep(WATCH_SECONDS)
            seconds -= WATCH_SECONDS

    def _is_loaded(self, loaded: Loaded) -> bool:
        return self._loader.loaded.get((loaded.name, loaded.version)) is loaded
