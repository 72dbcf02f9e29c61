"""The adapters of an engine by name: which place of the stack each has, and which places are free.

They come and go in the engine's thread, between two steps; clients look names up.
"""

import itertools
from dataclasses import dataclass

from infer.engine.adapters import AdapterStack, Factors
from infer.engine.runner import Runner


@dataclass(frozen=True)
class Adapter:
    """place: its number in the stack. identity: no two that were ever loaded share it."""

    place: int
    identity: str


class LoadedAdapters:
    """Of a runner, whose stack they lie in; without a stack there are none."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self._serials = itertools.count()
        self._by_name: dict[str, Adapter] = {}
        self._leaving: set[int] = set()

    def reset(self) -> None:
        """None is loaded."""
        if self._by_name or self._leaving:
            self._by_name, self._leaving = {}, set()
            self._runner.take_adapters()

    @property
    def stack(self) -> AdapterStack:
        """Raises ValueError."""
        if self._runner.adapters is None:
            raise ValueError("this engine serves no adapters; start it with max_adapters above 0")
        return self._runner.adapters

    def named(self, name: str | None) -> Adapter | None:
        """Raises ValueError for one that is not loaded."""
        if name is None:
            return None
        if name not in self._by_name:
            raise ValueError(f"there is no adapter {name!r}; {self._loaded()}")
        return self._by_name[name]

    def place_for(self, name: str) -> int:
        """Raises ValueError."""
        taken = {adapter.place for adapter in self._by_name.values()} | self._leaving
        free = [place for place in range(self.stack.count) if place not in taken]
        if name in self._by_name:
            raise ValueError(f"an adapter {name!r} is loaded; remove it first")
        if not free:
            raise ValueError(
                f"{self.stack.count} adapters are loaded, as many as may (max_adapters)"
            )
        return free[0]

    def load(self, name: str, place: int, factors: Factors) -> None:
        self._runner.put_adapter(place, factors)
        self._by_name[name] = Adapter(place, f"{name} {next(self._serials)}")

    def leave(self, name: str) -> Adapter:
        """No request finds it any more; its place is free once it is unloaded. Raises ValueError
        for one that is not loaded."""
        adapter = self._by_name.pop(name, None)
        if adapter is None:
            raise ValueError(f"no adapter {name!r} is loaded; {self._loaded()}")
        self._leaving.add(adapter.place)
        return adapter

    def unload(self, adapter: Adapter) -> None:
        """What left."""
        self._runner.take_adapter(adapter.place)
        self._leaving.discard(adapter.place)

    def _loaded(self) -> str:
        names = ", ".join(map(repr, sorted(self._by_name)))
        return f"loaded are {names}" if names else "none is loaded"
