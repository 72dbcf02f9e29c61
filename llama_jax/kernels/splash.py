"""Splash attention, the TPU kernel that JAX ships: exact attention that never holds the scores."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llama_jax.config import LogicalRules
from llama_jax.mesh.sequence import balanced_places, in_text_order, length_axes, length_parts
from llama_jax.mesh.sharding import mesh_axes, partition_spec

_BLOCK = 512  # queries and keys of a tile; what the kernel's authors use for training
_LANES = 128  # the width of a TPU register: heads and lengths come in multiples of it


def visited_share(length: int, sliding_window: int | None, parts: int = 1) -> float:
    """The part of all pairs of blocks in which a query may see a key: what the kernel computes.
    `parts` as `mesh.sequence.length_parts` has it."""
    block = _block(length, parts)
    count = length // block
    visited = 0
    for row in range(count):
        first = 0 if sliding_window is None else max(row * block - sliding_window + 1, 0) // block
        visited += row - first + 1
    return visited / count**2


def padded_size(head_dim: int) -> int:
    """The head size that the kernel computes with."""
    return -(-head_dim // _LANES) * _LANES


def _block(length: int, parts: int) -> int:
    """A block lies in one piece of a divided sequence."""
    piece = length if parts == 1 else length // (2 * parts)
    return next(size for size in (_BLOCK, 256, _LANES) if piece % size == 0)


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

    Rows and heads stay on their devices. Where the mesh divides sequences, all arrays are in
    balanced order (`mesh.sequence`), and so is the result. Heads narrower than the kernel's are
    filled up with zeros, which changes no score. `interpret` runs the kernel without a TPU, slowly.
    Raises ValueError for a length that is not a multiple of 128, a divided one of twice the parts.
    """
    length, size = query.shape[1], query.shape[-1]
    parts = length_parts(rules)
    unit = _LANES * (1 if parts == 1 else 2 * parts)
    if length % unit:
        raise ValueError(
            f"splash attention needs a sequence length that is a multiple of {unit}, not "
            f"{length}; set compute.attention to reference"
        )
    wide = [(0, 0)] * 3 + [(0, padded_size(size) - size)]
    query = query * size**-0.5
    operands: list[Any] = [jnp.pad(x, wide).transpose(0, 2, 1, 3) for x in (query, key, value)]
    axes: list[tuple[str | None, ...]] = [
        ("batch", name, "length", None) for name in ("heads", "kv_heads", "kv_heads")
    ]
    if segment_ids is not None:
        operands.append(segment_ids)
        axes.append(("batch", "length"))
    heads = query.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        kernel = _kernel(heads, length, parts, sliding_window, interpret)
        return _run(kernel, *operands).transpose(0, 2, 1, 3)[..., :size]
    # The compiler cannot divide a kernel, so it is told how.
    heads //= math.prod(mesh.shape[name] for name in mesh_axes(rules, "heads"))
    kernel = _kernel(heads, length, parts, sliding_window, interpret)
    along = PartitionSpec(None, length_axes(rules) if parts > 1 else None)
    specs = tuple(partition_spec(each, rules) for each in axes)
    mixed = jax.shard_map(
        partial(_run, gathered_over=length_axes(rules) if parts > 1 else ()),
        in_specs=(kernel.manual_sharding_spec(NamedSharding(mesh, along)), *specs),
        out_specs=specs[0],
        check_vma=False,
    )(kernel, *operands)
    return mixed.transpose(0, 2, 1, 3)[..., :size]


def _run(
    kernel: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    gathered_over: tuple[str, ...] = (),
) -> jax.Array:
    """query [B, N, T, H], already scaled, key and value [B, K, T, H] -> [B, N, T, H], on one
    device. gathered_over: the mesh axes that divide the sequence, all of whose keys are wanted."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    def whole(x: jax.Array, axis: int) -> jax.Array:
        if not gathered_over:
            return x
        gathered = jax.lax.all_gather(x, gathered_over, axis=axis, tiled=True)
        return in_text_order(gathered, jax.lax.axis_size(gathered_over), axis)

    key, value = whole(key, 2), whole(value, 2)
    if segment_ids is None:
        return jax.vmap(kernel, in_axes=0)(query, key, value)
    segments = splash.SegmentIds(q=segment_ids, kv=whole(segment_ids, 1))
    return jax.vmap(kernel)(query, key, value, segments)


def _kernel(
    heads: int, length: int, parts: int, sliding_window: int | None, interpret: bool
) -> Any:
    """The kernel for the `heads` heads of a device and all rows of a mask, its queries in balanced
    order if there are several parts."""
    # Imported where it is used: Pallas takes a third of a second, which no CPU run needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask: Any = masks.CausalMask(shape)
    if sliding_window is not None:
        mask = masks.LocalMask(shape, (sliding_window - 1, 0), 0)
    if parts > 1:
        mask.q_sequence = balanced_places(length, parts)
    block = _block(length, parts)
    return kernel.make_splash_mha(
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
        q_seq_shards=parts,
        interpret=interpret,
    )
