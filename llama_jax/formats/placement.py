"""Device arrays filled straight from a file, slice by slice, without a second copy on the host."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

# XLA's alignment on a CPU: a host buffer that has it becomes the device array without a copy.
_ALIGNMENT = 64

Read = Callable[[np.ndarray, tuple[slice, ...]], None]


def place(
    shape: tuple[int, ...], dtype: np.dtype[Any], read: Read, sharding: Sharding | None
) -> jax.Array:
    """An array whose values `read(out, index)` writes, slice by slice, where they belong.

    `read` fills `out` with the array's `index`, a slice with both bounds for each dimension. Each
    distinct slice is read once, into a buffer of its size. On a CPU that buffer itself becomes the
    array, elsewhere it is freed as soon as it is transferred. Without a sharding the array lies on
    the default device.
    """
    if sharding is None:
        return _finished(jax.device_put(_filled(dtype, read, [(0, size) for size in shape])))
    by_slice: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        by_slice.setdefault(bounds, []).append(device)
    parts: list[jax.Array] = []
    for bounds, devices in by_slice.items():
        buffer = _filled(dtype, read, list(bounds))
        parts += [_finished(jax.device_put(buffer, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _finished(array: jax.Array) -> jax.Array:
    """Waits for the transfer, so that the host buffer can go before the next one is filled."""
    return jax.block_until_ready(array)


def _filled(dtype: np.dtype[Any], read: Read, bounds: list[tuple[int, int]]) -> np.ndarray:
    shape = tuple(high - low for low, high in bounds)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    out = raw[start : start + num_bytes].view(dtype).reshape(shape)
    read(out, tuple(slice(low, high) for low, high in bounds))
    return out
