"""A copy in host memory of what this process holds of an array, to be put back later."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding


@dataclass(frozen=True)
class HostCopy:
    """parts: by their place in the whole; devices that hold the same share one."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: dict[tuple[tuple[int, int], ...], np.ndarray]

    @classmethod
    def of(cls, array: jax.Array) -> "HostCopy":
        """Waits for the array."""
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for shard in array.addressable_shards:
            place = _place(shard.index, array.shape)
            if place not in parts:
                parts[place] = np.asarray(shard.data)
        return cls(array.shape, array.sharding, parts)

    def to_devices(self) -> jax.Array | np.ndarray:
        """The same array again; of several processes all must ask for it. One of a single device
        stays on the host, for whatever is computed with it: as an array it would be bound to the
        device, and what is computed with it too, which JAX compiles anew."""
        if isinstance(self.sharding, SingleDeviceSharding):
            (whole,) = self.parts.values()
            return whole
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.parts[_place(index, self.shape)]
        )


def _place(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)
