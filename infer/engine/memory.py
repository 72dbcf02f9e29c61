"""How much an engine may hold where nobody said it."""

import os
from pathlib import Path

import jax
import numpy as np

from infer.engine.options import EngineOptions
from llama_jax.config import ModelConfig

# Of the memory of the device. The weights come first, and a CPU's memory belongs to others too.
_SHARE = 1 / 8
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def fitting_context(config: ModelConfig, options: EngineOptions, dtype: str) -> int:
    """Tokens a slot can have so that all slots, and blocks for all of them, take an eighth of the
    memory; at least one block, whatever that takes."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    token_bytes = values * np.dtype(jax.numpy.dtype(dtype)).itemsize
    tokens = int(memory_bytes() * _SHARE) // (token_bytes * (2 * options.max_slots + 1))
    size = options.block_size
    return max(size, tokens // size * size)


def memory_bytes() -> int:
    """Of the device that JAX computes on; of a CPU what the machine, or its container, has."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return int(device.memory_stats()["bytes_limit"])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file():
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
        if limit != "max":
            return min(machine, int(limit))
    return machine
