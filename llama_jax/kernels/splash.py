"""Splash attention, the TPU kernel that JAX ships: exact attention that never holds the scores."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import LogicalRules
from llama_jax.mesh.sharding import partition_spec

_BLOCK = 512  # queries and keys of a tile; what the kernel's authors use for training
_LANES = 128  # the width of a TPU register: heads and lengths come in multiples of it


def visited_share(length: int, sliding_window: int | None) -> float:
    """The part of all pairs of blocks in which a query may see a key: what the kernel computes."""
    block = _block(length)
    count = length // block
    visited = 0
    for row in range(count):
        first = 0 if sliding_window is None else max(row * block - sliding_window + 1, 0) // block
        visited += row - first + 1
    return visited / count**2


def padded_size(head_dim: int) -> int:
    """The head size that the kernel computes with."""
    return -(-head_dim // _LANES) * _LANES


def _block(length: int) -> int:
    return next(size for size in (_BLOCK, 256, _LANES) if length % size == 0)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    sliding_window: int | None,
    rules: LogicalRules,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention within segments, equal to `model.attention.attend` up to rounding.

    Rows and heads stay on their devices. Heads narrower than the kernel's are filled up with zeros,
    which changes no score. `interpret` runs the kernel without a TPU, slowly. Raises ValueError for
    a length that is not a multiple of 128.
    """
    length, size = query.shape[1], query.shape[-1]
    if length % _LANES:
        raise ValueError(
            f"splash attention needs a sequence length that is a multiple of {_LANES}, not "
            f"{length}; set compute.attention to reference"
        )
    run = partial(_on_one_device, sliding_window=sliding_window, interpret=interpret)
    wide = [(0, 0)] * 3 + [(0, padded_size(size) - size)]
    query = query * size**-0.5
    operands: list[Any] = [jnp.pad(x, wide).transpose(0, 2, 1, 3) for x in (query, key, value)]
    axes: list[tuple[str | None, ...]] = [
        ("batch", name, None, None) for name in ("heads", "kv_heads", "kv_heads")
    ]
    if segment_ids is not None:
        operands.append(segment_ids)
        axes.append(("batch", None))
    if not jax.sharding.get_abstract_mesh().empty:
        # The compiler cannot divide a kernel, so it is told how.
        run = jax.shard_map(
            run,
            in_specs=tuple(partition_spec(each, rules) for each in axes),
            out_specs=partition_spec(axes[0], rules),
            check_vma=False,
        )
    return run(*operands).transpose(0, 2, 1, 3)[..., :size]


def _on_one_device(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    sliding_window: int | None,
    interpret: bool,
) -> jax.Array:
    """query [B, N, T, H], already scaled, key and value [B, K, T, H] -> [B, N, T, H]."""
    # Imported where it is used: Pallas takes a third of a second, which no CPU run needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = query.shape[1:3]
    shape = (length, length)
    mask: Any = masks.CausalMask(shape)
    if sliding_window is not None:
        mask = masks.LocalMask(shape, (sliding_window - 1, 0), 0)
    block = _block(length)
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if segment_ids is None:
        return jax.vmap(attention)(query, key, value)
    segments = kernel.SegmentIds(q=segment_ids, kv=segment_ids)
    return jax.vmap(attention)(query, key, value, segments)
