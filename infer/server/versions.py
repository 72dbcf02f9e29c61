"""Which versions of which models there are, and which of them answers; nothing of what is loaded.

A model is given at the start, with one version, or is in the registry. What the registry says of
the versions that answer is read once and remembered.
"""

import asyncio
import logging
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from infer.registry import Registry, State, UnknownNameError
from infer.server.errors import ApiError, unknown_model, without_reason
from infer.server.loaded import Key, Loaded, Source
from llama_jax.formats.json_fields import read_text

logger = logging.getLogger(__name__)


class Versions:
    """See the module. given: by their names, the versions that were given at the start."""

    def __init__(self, sources: list[Source], registry: Registry | None):
        self.given = {source.name: source for source in sources}
        self._registry = registry
        if registry is not None:
            both = set(self.given) & set(registry.names())
            if both:
                raise ValueError(
                    f"the model {min(both)} is given and in the registry too; name the given one "
                    f"otherwise: NAME=MODEL"
                )
        # The states of models whose registry must not be asked for every request.
        self._states: dict[str, State] = {}

    # What there is

    def names(self) -> list[str]:
        return [*self.given, *(self._registry.names() if self._registry else [])]

    def of(self, name: str) -> list[str]:
        """Those of the registry."""
        return [] if self._registry is None else self._registry.versions(name)

    def has(self, name: str, version: str) -> bool:
        given = self.given.get(name)
        return version in self.of(name) if given is None else version == given.version

    def check(self, name: str, version: str) -> None:
        """Raises ApiError 404 unless the version is known."""
        if not self.has(name, version):
            raise unknown_model(f"there is no version {version[:100]!r} of {name[:100]!r}")

    def adapters(self, loaded: Loaded) -> Mapping[str, Path]:
        """Those that may be loaded beside a version."""
        if loaded.name in self.given or self._registry is None:
            return loaded.source.adapters
        return self._registry.adapters(loaded.name)

    def source(self, key: Key, *, hashes: bool, adapters: tuple[str, ...]) -> Source:
        """What a version is made from, its files checked. Raises ValueError, UnknownNameError.

        adapters: those to be loaded with it; which are not there any more are left out.
        """
        name, version = key
        if name in self.given:
            return self.given[name]
        assert self._registry is not None
        manifest = self._registry.verify(name, version, hashes=hashes)
        folder = self._registry.folder(name, version)
        template = manifest.template
        known = self._registry.adapters(name)
        return Source(
            name=name,
            version=version,
            model=folder / manifest.model,
            adapter=None if manifest.adapter is None else folder / manifest.adapter,
            template=None if template is None else read_text(folder / template),
            adapters={adapter: known[adapter] for adapter in adapters if adapter in known},
            created=manifest.created,
        )

    # Which answers

    async def choose(self, name: str, model: str, request_id: str) -> str:
        """The version that answers a request for `model`. Raises ApiError."""
        unreadable = f"which version of {name} is active cannot be read"
        with without_reason("registry_damaged", unreadable):
            if name not in self.given and name not in self._states:
                # The registry may lie on a slow disk; its answer is remembered.
                await asyncio.to_thread(self.state, name, model)
            if name not in self.given:
                state = self.state(name, model)
                if state.canary is not None and _share_of(request_id) < state.share:
                    return state.canary
            return self.active(name, model)

    def active(self, name: str, model: str) -> str:
        """The version that answers all requests but a canary's. Raises ApiError."""
        if name in self.given:
            return self.given[name].version
        state = self.state(name, model)
        if state.active is None:
            raise unknown_model(f"no version of {name} is active")
        return state.active

    def state(self, name: str, model: str) -> State:
        """Raises ApiError, which names `model` where there is none."""
        if name not in self._states:
            versions = self.of(name)
            if self._registry is None or not versions:
                raise unknown_model(f"there is no model {model[:100]!r}")
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

    def readable_state(self, name: str) -> State:
        """None active where it cannot be read: one damaged model must not hide the others."""
        try:
            return self.state(name, name)
        except ApiError:
            return State()

    def remembered_state(self, name: str) -> State:
        """None active where it has not been read."""
        return self._states.get(name, State())

    async def set_state(self, name: str, state: State) -> State:
        """On the disk first. Raises ApiError."""
        assert self._registry is not None
        try:
            await asyncio.to_thread(self._registry.set_state, name, state)
        except (OSError, UnknownNameError) as error:
            logger.error("state not written", extra={"model": name, "reason": str(error)})
            message = f"which version of {name} is active stays as it was: {error}"
            raise ApiError(503, message, code="state_not_written") from error
        self._states[name] = state
        return state


def _share_of(request_id: str) -> float:
    """A number in [0, 1) that the same request id always gets."""
    return zlib.crc32(request_id.encode()) / 2**32
