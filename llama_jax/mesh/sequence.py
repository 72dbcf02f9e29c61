"""Sequences divided over the mesh: who holds which tokens, and how keys reach all queries.

Under a causal mask the late tokens of a row see many keys and the early ones few. So a device does
not hold neighbouring tokens: of 2 c pieces, device i of c holds pieces i and 2 c - 1 - i, and all
have the same work. That order, "balanced", exists inside the layers only; what goes in and comes
out is in the order of the text. Keys and values are gathered whole (few heads have them), as in
Llama 3's training (arXiv:2407.21783, section 3.3.2), from where the order comes too.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from llama_jax.config import Compute, LogicalRules
from llama_jax.mesh.sharding import mesh_axes, partition_spec, reduce_scattered


def length_axes(rules: LogicalRules) -> tuple[str, ...]:
    """The mesh axes that sequences are divided over."""
    return mesh_axes(rules, "length")


def length_parts(rules: LogicalRules) -> int:
    """Into how many parts the mesh in force divides sequences; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[name] for name in length_axes(rules))


def undivided(rules: LogicalRules) -> LogicalRules:
    """The same rules with every sequence whole."""
    return tuple((axis, None if axis == "length" else names) for axis, names in rules)


def fitting(compute: Compute, length: int) -> Compute:
    """With sequences undivided where the mesh in force does not divide this length."""
    parts = length_parts(compute.rules)
    if parts == 1 or length % (2 * parts) == 0:
        return compute
    return dataclasses.replace(compute, rules=undivided(compute.rules))


def balanced_places(length: int, parts: int) -> np.ndarray:
    """[T], the place in the text of each token in balanced order."""
    pieces = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    order = [piece for part in range(parts) for piece in (part, 2 * parts - 1 - part)]
    return pieces[order].reshape(-1)


def to_balanced(x: jax.Array, rules: LogicalRules) -> jax.Array:
    """[B, T, ...] from the order of the text; 2 c pieces, one exchange between neighbours."""
    return _divided(_to_balanced, x, rules)


def from_balanced(x: jax.Array, rules: LogicalRules) -> jax.Array:
    """[B, T, ...] to the order of the text."""
    return _divided(_from_balanced, x, rules)


def _divided(run: Any, x: jax.Array, rules: LogicalRules) -> jax.Array:
    parts = length_parts(rules)
    if parts == 1:
        return x
    spec = partition_spec(("batch", "length", *[None] * (x.ndim - 2)), rules)
    axes = length_axes(rules)
    mapped = partial(run, axes=axes, parts=parts)
    return jax.shard_map(mapped, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _holder(piece: int, parts: int) -> int:
    return min(piece, 2 * parts - 1 - piece)


def _to_balanced(x: jax.Array, *, axes: tuple[str, ...], parts: int) -> jax.Array:
    """Device i holds pieces 2 i and 2 i + 1. Its even piece and its odd one each go to another
    device, and every device gets one of each kind."""
    even, odd = jnp.split(x, 2, axis=1)
    sent = [
        jax.lax.ppermute(half, axes, [(i, _holder(2 * i + kind, parts)) for i in range(parts)])
        for kind, half in enumerate((even, odd))
    ]
    first_is_even = jax.lax.axis_index(axes) % 2 == 0
    first = jnp.where(first_is_even, sent[0], sent[1])
    second = jnp.where(first_is_even, sent[1], sent[0])
    return jnp.concatenate([first, second], axis=1)


def _from_balanced(x: jax.Array, *, axes: tuple[str, ...], parts: int) -> jax.Array:
    first, second = jnp.split(x, 2, axis=1)
    first_is_even = jax.lax.axis_index(axes) % 2 == 0
    kinds = (jnp.where(first_is_even, first, second), jnp.where(first_is_even, second, first))
    halves = [
        jax.lax.ppermute(half, axes, [(_holder(2 * i + kind, parts), i) for i in range(parts)])
        for kind, half in enumerate(kinds)
    ]
    return jnp.concatenate(halves, axis=1)


def gather_keys(x: jax.Array, axis: str, rules: LogicalRules) -> jax.Array:
    """[B, T, K, H] in balanced order, T divided -> whole and in the order of the text."""
    parts = partition_spec(("batch", "length", axis, None), rules)
    whole = PartitionSpec(parts[0], None, *parts[2:])
    return in_text_order(reduce_scattered(x, whole, parts), length_parts(rules), 1)


def in_text_order(x: Array, parts: int, axis: int) -> jax.Array:
    """A whole sequence along `axis`, from balanced order."""
    pieces = jnp.split(x, 2 * parts, axis=axis)
    return jnp.concatenate([*pieces[::2], *pieces[:0:-2]], axis=axis)
