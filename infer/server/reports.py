"""What there is and where it stands, for clients, for admins and for metrics.

Reports read the registry, so they may take a while.
"""

from collections.abc import Mapping
from typing import Any

from infer.registry import State
from infer.server.loader import Loader
from infer.server.versions import Versions
from infer.server.watcher import Watcher


class Reports:
    """Reports of these three, which change nothing."""

    def __init__(self, versions: Versions, loader: Loader, watcher: Watcher):
        self._versions, self._loader, self._watcher = versions, loader, watcher

    def catalog(self) -> list[dict[str, Any]]:
        """The entries of /v1/models: what a request may name, with the active version."""
        entries = []
        for name in self._versions.names():
            given = self._versions.given.get(name)
            version = self._versions.readable_state(name).active if given is None else given.version
            loaded = None if version is None else self._loader.loaded.get((name, version))
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
        for name in self._versions.names():
            given = self._versions.given.get(name)
            state = State(given.version) if given else self._versions.readable_state(name)
            versions = [given.version] if given else self._versions.of(name)
            rows.append(
                {
                    "name": name,
                    "active": state.active,
                    "previous": list(state.previous),
                    "canary": state.canary,
                    "share": state.share,
                    "versions": [self._version(name, version) for version in versions],
                }
            )
        return rows

    def _version(self, name: str, version: str) -> dict[str, Any]:
        key = (name, version)
        loaded = self._loader.loaded.get(key)
        state = "loading" if self._loader.is_loading(key) else "unloaded"
        if loaded is not None:
            state = "restarting" if self._watcher.is_restarting(key) else loaded.engine.state
        row: dict[str, Any] = {"version": version, "state": state, "in_use": 0, "adapters": []}
        if loaded is not None:
            row |= {"in_use": loaded.in_use, "adapters": sorted(loaded.adapters)}
            row |= {"max_model_len": loaded.engine.max_context}
            row |= {"quantization": loaded.quantization}
        return row

    def statistics(self) -> list[tuple[str, str, Mapping[str, float]]]:
        """Of the engine of each loaded version."""
        return [
            (each.name, each.version, each.engine.statistics())
            for each in list(self._loader.loaded.values())
        ]
