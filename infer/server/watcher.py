"""The watch over versions in memory: broken engines start again, unused versions are unloaded."""

import asyncio
import functools
import logging
from collections.abc import Callable

from infer.server.loaded import Key, Loaded, start_again
from infer.server.loader import Loader
from infer.server.settings import Settings

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 60.0


class Watcher:
    """on_restart: called when an engine that broke is about to be started again."""

    def __init__(self, settings: Settings, loader: Loader, clock: Callable[[], float]):
        self._settings, self._loader, self._clock = settings, loader, clock
        self._restarting: dict[Key, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self.on_restart: Callable[[Loaded], None] = lambda loaded: None

    def start(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    def is_restarting(self, key: Key) -> bool:
        return key in self._restarting

    async def _watch(self) -> None:
        loader = self._loader
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for key, loaded in list(loader.loaded.items()):
                if loaded.engine.state == "broken" and key not in self._restarting:
                    task = asyncio.create_task(self._restart(key, loaded))
                    self._restarting[key] = task
                    task.add_done_callback(functools.partial(self._restarted, key))
                elif self._is_idle(loaded):
                    await loader.put_away(loaded)
            # What a switch has replaced.
            if len(loader.loaded) > self._settings.max_loaded:
                for loaded in loader.idle(but_answering=True)[:1]:
                    await loader.put_away(loaded)

    def _is_idle(self, loaded: Loaded) -> bool:
        limit = self._settings.idle_unload_seconds
        if limit is None or loaded.is_pinned or loaded.in_use:
            return False
        return self._clock() - loaded.last_used > limit

    def _restarted(self, key: Key, task: asyncio.Task[None]) -> None:
        self._restarting.pop(key, None)

    async def _restart(self, key: Key, broken: Loaded) -> None:
        extra = {"model": broken.name, "version": broken.version}
        logger.error("engine broke; it is started again", extra=extra)
        self.on_restart(broken)
        wait = 1.0
        while key in self._loader.loaded:
            try:
                await asyncio.to_thread(start_again, broken)
            except (ValueError, OSError, RuntimeError) as error:
                logger.error("engine did not start", extra=extra, exc_info=error)
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_BACKOFF_SECONDS)
            else:
                logger.info("engine started again", extra=extra)
                return
