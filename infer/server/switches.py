"""Which version answers, as admins change it: one switch at a time, never to a version not up."""

import asyncio
from dataclasses import replace

from infer.registry import State
from infer.server.errors import ApiError, not_ready
from infer.server.loader import Loader
from infer.server.versions import Versions
from infer.server.watcher import Watcher


class Switches:
    def __init__(self, versions: Versions, loader: Loader, watcher: Watcher):
        self._versions, self._loader, self._watcher = versions, loader, watcher
        self._changing = asyncio.Lock()

    async def activate(self, name: str, version: str, share: float | None) -> State:
        """Lets a version answer: all requests, or `share` of them beside the active one.

        It is loaded and has answered a probe before anything changes; until then, and where that
        fails, the version before answers. A state that is damaged is written anew. Raises ApiError
        with the reason.
        """
        self._versions.check(name, version)
        self._check_switchable(name)
        async with self._changing:
            state = await asyncio.to_thread(self._versions.readable_state, name)
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
            state = self._versions.state(name, name)
            if state.canary is not None:
                return await self._versions.set_state(name, replace(state, canary=None, share=0.0))
            if not state.previous:
                raise ApiError(409, f"no version of {name} was active before {state.active}")
            new = State(active=state.previous[-1], previous=state.previous[:-1])
            return await self._switch(name, state.previous[-1], new)

    def _check_switchable(self, name: str) -> None:
        if name in self._versions.given:
            raise ApiError(409, f"{name} was given at the start and has one version only")

    async def _switch(self, name: str, version: str, state: State) -> State:
        key = (name, version)
        with self._loader.keeping(key):
            loaded = await self._loader.load(key, state)
            # One that has been loaded for long may be broken.
            stands = self._watcher.state(loaded)
            if stands != "ready":
                raise not_ready(f"{name} version {version} is {stands}; ask again")
            return await self._versions.set_state(name, state)
