"""How much an engine may hold where nobody said it."""

import os
from collections.abc import Callable
from pathlib import Path

import jax

from infer.engine import placement
from infer.engine.options import EngineOptions
from infer.engine.shapes import draft_slots
from llama_jax.config import ModelConfig
from llama_jax.kernels.paged import empty_pages
from llama_jax.kernels.rounded import token_bytes

# Of the memory of the device. The weights come first, and a CPU's memory belongs to others too.
_SHARE = 1 / 8
# Of what an accelerator has free once the weights are there: programs need room for themselves.
_FREE_SHARE = 0.8
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def longest_context(config: ModelConfig) -> int:
    """Tokens that an engine lets a prompt and its answer have.

    Scaling adds none: `max_position_embeddings` is the length with it (131072 of Llama 3.1's 8192).
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        # Beyond it the angles of a prompt's first tokens would depend on its length.
        return scaling.original_max_position_embeddings or config.max_position_embeddings
    return config.max_position_embeddings


def check_context(config: ModelConfig, max_context: int | None) -> None:
    """Raises ValueError for more than `longest_context`."""
    longest = longest_context(config)
    if max_context is not None and max_context > longest:
        raise ValueError(
            f"max_context is {max_context}, but the model was made for {longest} tokens; give at "
            f"most {longest}, or leave it out"
        )


def blocks_and_context(
    config: ModelConfig,
    options: EngineOptions,
    longest: int,
    *,
    dtype: str,
    draft: ModelConfig | None = None,
) -> tuple[int, int]:
    """How many blocks there are, and the longest context, where keys and values lie in slots.
    longest: the model's. dtype, draft: as in `fitting_context`."""
    wanted = options.max_context or fitting_context(config, options, dtype, draft=draft)
    wanted = min(longest, wanted)
    num = options.num_blocks or options.max_slots * -(-wanted // options.block_size)
    return num, min(wanted, num * options.block_size)


def pages_and_context(
    config: ModelConfig,
    options: EngineOptions,
    longest: int,
    *,
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    draft: ModelConfig | None = None,
    least: Callable[[int], int] | None = None,
) -> tuple[int, int]:
    """The same where they lie in pages: as many as all choices can hold, or there is room for. A
    draft model has slots on every device, which take up to half of the room, unless
    `max_context` says how long they are. least: of the numbers that several processes give.

    Raises ValueError where those leave no room for pages and nobody said how many there are.
    """
    parts = 1 if mesh is None else placement.check(config, mesh)
    kernel = placement.has_kernel(mesh)
    size = page_bytes(config, options, dtype, parts=parts, kernel=kernel)
    wanted = min(longest, options.max_context or longest)
    room = room_bytes(placement.first_device(mesh))
    if least is not None:
        room = least(room)
    if draft is not None:
        slots = draft_slots(options)
        per_token = token_bytes(draft, dtype) * slots
        if options.max_context is None:
            tokens = room // 2 // per_token
            wanted = min(wanted, max(tokens // options.block_size, 1) * options.block_size)
        room -= per_token * wanted
        if room < 2 * size and options.num_blocks is None:
            raise ValueError(
                f"the draft model's keys and values, {slots} slots of {wanted} "
                f"tokens, take {per_token * wanted} bytes, and leave {max(room, 0)} for pages of "
                f"{size}; give a smaller max_context or max_slots, or say how many pages"
            )
    num = options.num_blocks or min(
        options.max_slots * -(-wanted // options.block_size),
        max(2, room // size),
    )
    return num, min(wanted, num * options.block_size)


def fitting_context(
    config: ModelConfig, options: EngineOptions, dtype: str, *, draft: ModelConfig | None = None
) -> int:
    """Tokens a slot can have so that all slots, and blocks for all of them, take an eighth of the
    memory; at least one block, whatever that takes. dtype: of the cache. draft: a model that
    has slots too, and no blocks."""
    used = token_bytes(config, dtype) * (2 * options.max_slots + 1)
    if draft is not None:
        used += token_bytes(draft, dtype) * draft_slots(options)
    tokens = int(memory_bytes() * _SHARE) // used
    size = options.block_size
    return max(size, tokens // size * size)


def page_bytes(
    config: ModelConfig, options: EngineOptions, dtype: str, *, parts: int, kernel: bool
) -> int:
    """Of a block's page in all layers, on each of the `parts` devices that share the heads.

    Raises ValueError for pages that the kernel cannot read.
    """
    page = jax.eval_shape(
        lambda: empty_pages(config, 1, options.block_size, dtype, parts=parts, kernel=kernel)
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(page))
    return config.num_hidden_layers * size // parts


def room_bytes(device: jax.Device) -> int:
    """For keys and values on a device that holds the weights: of a CPU an eighth of its memory, of
    others most of what is free."""
    if device.platform == "cpu":
        return int(memory_bytes() * _SHARE)
    stats = device.memory_stats()
    return int((stats["bytes_limit"] - stats["bytes_in_use"]) * _FREE_SHARE)


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
