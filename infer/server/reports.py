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
            entries += self._entries(name, name, version)
        return entries

    def entry(self, model: str) -> dict[str, Any] | None:
        """The entry of what a request may name, certain versions included; None for all else."""
        rest, _, _ = model.partition(":")
        name, at, version = rest.partition("@")
        if not at:
            entries = self.catalog()
        elif self._versions.has(name, version):
            entries = self._entries(rest, name, version)
        else:
            entries = []
        return next((entry for entry in entries if entry["id"] == model), None)

    def _entries(self, model: str, name: str, version: str | None) -> list[dict[str, Any]]:
        """A version under the name `model`, and with each adapter that is loaded beside it."""
        loaded = None if version is None else self._loader.loaded.get((name, version))
        entry: dict[str, Any] = {
            "id": model,
            "object": "model",
            "created": 0 if loaded is None else loaded.source.created,
            "owned_by": "llama-jax",
            "version": version,
            "loaded": loaded is not None,
            "max_model_len": None if loaded is None else loaded.engine.max_context,
        }
        adapters = [] if loaded is None else sorted(loaded.adapters)
        with_adapters = [{**entry, "id": f"{model}:{each}", "parent": model} for each in adapters]
        return [entry, *with_adapters]

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
            state = self._watcher.state(loaded)
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
