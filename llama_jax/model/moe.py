"""Mixtral's sparse mixture of experts: routing, two ways to run it, and the balancing loss.

Nothing is dropped: every token reaches its experts whatever the others chose, so a token's result
does not depend on the batch it is in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import Compute
from llama_jax.kernels import megablox
from llama_jax.mesh.sharding import mesh_axes, partition_spec, rows_are_divided
from llama_jax.model.gradients import gated
from llama_jax.weights.dot import dot
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.tensors import to_array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """Sums over tokens: how often each expert was the k-th choice [k, E], the router's
    probabilities [E], and the number of tokens []. Layers add up."""

    chosen: Float[Array, "k E"]
    probability: Float[Array, " E"]
    num_tokens: Float[Array, ""]


# Of all experts: w1 [E, F, D], w2 [E, D, F], w3 [E, F, D].
Matrices = tuple[Leaf, ...]
Arrays = tuple[jax.Array, ...]
# (those a device holds, x [T, D], weights [T, k], experts [T, k]) -> [T, D]
Run = Callable[[Arrays, jax.Array, jax.Array, jax.Array], jax.Array]


def route(
    logits: Float[Array, "T E"], num_experts_per_tok: int
) -> tuple[Float[Array, "T k"], Int[Array, "T k"], Float[Array, "T E"]]:
    """(weights that sum to one, expert ids, all probabilities), computed in float32.

    The softmax is over all experts and the chosen ones are normalised again, which equals a
    softmax over the chosen logits alone.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, num_experts_per_tok)
    return weights / weights.sum(axis=-1, keepdims=True), experts, probabilities


def balancing_loss(stats: RouterStats) -> Float[Array, ""]:
    """The auxiliary loss of Switch Transformers (arXiv:2101.03961, eq. 4-6) as transformers
    computes it for Mixtral: over the tokens of all layers together, unscaled."""
    num_experts = stats.probability.shape[0]
    count = jnp.maximum(stats.num_tokens, 1.0)
    share = stats.chosen / count
    return num_experts * jnp.sum(share * (stats.probability / count)[None, :])


def router_stats(
    experts: Int[Array, "T k"], probabilities: Float[Array, "T E"], weight: Float[Array, " T"]
) -> RouterStats:
    """Counts of one layer; `weight` is 1 for real tokens and 0 for padding."""
    one_hot = jax.nn.one_hot(experts, probabilities.shape[-1], dtype=jnp.float32)
    return RouterStats(
        chosen=jnp.einsum("tke,t->ke", one_hot, weight),
        probability=weight @ probabilities,
        num_tokens=weight.sum(),
    )


def mix(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    w1: Leaf,
    w2: Leaf,
    w3: Leaf,
    *,
    compute: Compute,
) -> Float[Array, "B T D"]:
    """The weighted sum of each token's experts; w1, w3: [E, F, D], w2: [E, D, F].

    On a mesh the experts stay where they are, and every device computes those it holds for all the
    tokens of the devices that share its other experts (`_on_mesh`).
    """
    flat, share, chosen = (array.reshape(-1, array.shape[-1]) for array in (x, weights, experts))
    if compute.moe == "dense":
        mixed = _dense(flat, share, chosen, (w1, w2, w3), compute=compute)
        return mixed.astype(x.dtype).reshape(x.shape)
    matrices = tuple(to_array(matrix, dtype=x.dtype) for matrix in (w1, w2, w3))
    if rows_are_divided(x.shape[0], compute.rules):
        return _on_mesh(x, weights, experts, matrices, compute)

    def run(matrices: Arrays, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        return _grouped(x, weights, experts, matrices, compute=compute).astype(x.dtype)

    return _in_chunks(run, matrices, flat, share, chosen, compute=compute).reshape(x.shape)


def _on_mesh(
    x: jax.Array, weights: jax.Array, experts: jax.Array, matrices: Arrays, compute: Compute
) -> jax.Array:
    """Tokens are gathered over the mesh axis of the experts, each device adds up what its own
    experts make of them, and the sums are scattered back. The compiler cannot divide a ragged
    product by itself: it would give every device all of it."""
    rules = compute.rules
    over, inner = mesh_axes(rules, "experts"), mesh_axes(rules, "mlp")
    tokens = partition_spec(("batch", "length", None), rules)

    def run(own: Arrays, *parts: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(over) * own[0].shape[0]
        x, weights, experts = (jax.lax.all_gather(part, over, tiled=True) for part in parts)
        mixed = _grouped(x, weights, experts, own, compute=compute, first=first)
        mixed = jax.lax.psum_scatter(jax.lax.psum(mixed, inner), over, tiled=True)
        return mixed.astype(x.dtype)

    def on_device(x: jax.Array, weights: jax.Array, experts: jax.Array, *own: jax.Array) -> Any:
        flat = (array.reshape(-1, array.shape[-1]) for array in (x, weights, experts))
        holders = jax.lax.axis_size(over)
        return _in_chunks(run, own, *flat, compute=compute, holders=holders).reshape(x.shape)

    wide, narrow = ("experts", "mlp", None), ("experts", None, "mlp")
    return jax.shard_map(
        on_device,
        in_specs=(
            tokens,
            tokens,
            tokens,
            *(partition_spec(axes, rules) for axes in (wide, narrow, wide)),
        ),
        out_specs=tokens,
        check_vma=False,
    )(x, weights, experts, *matrices)


def _in_chunks(
    run: Run,
    matrices: Arrays,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    *,
    compute: Compute,
    holders: int = 1,
) -> jax.Array:
    """`run` for a chunk of the tokens after another, when the backward pass is to recompute: it
    then keeps the tokens alone, and what is wide exists for one chunk at a time. `holders` devices
    give an equal part of a chunk each."""
    count = x.shape[0]
    num_chunks = min(count, math.ceil(count * holders / compute.moe_chunk_tokens))
    if num_chunks == 1 or not compute.cuts_experts:
        return run(matrices, x, weights, experts)
    size = math.ceil(count / num_chunks)

    def cut(array: jax.Array) -> jax.Array:
        filled = jnp.pad(array, [(0, size * num_chunks - count), (0, 0)])
        return filled.reshape(num_chunks, size, array.shape[-1])

    chunks = _recomputed(run, matrices, cut(x), cut(weights), cut(experts))
    return chunks.reshape(-1, chunks.shape[-1])[:count]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(
    run: Run, matrices: Arrays, x: jax.Array, weights: jax.Array, experts: jax.Array
) -> jax.Array:
    """`run` of each chunk; x [chunks, t, D]. Written with a gradient of its own because that of a
    loop would sum the gradients of bfloat16 matrices in bfloat16."""
    return jax.lax.map(lambda chunk: run(matrices, *chunk), (x, weights, experts))


def _recomputed_forward(run: Run, matrices: Any, x: Any, weights: Any, experts: Any) -> Any:
    """Of frozen matrices no gradient is asked for, and none is made; the structure of what is kept
    says which they are."""
    tokens = (x.value, weights.value, experts.value)
    values = tuple(matrix.value for matrix in matrices)
    is_trained = any(matrix.perturbed for matrix in matrices)
    trained, frozen = (values, ()) if is_trained else ((), values)
    return _recomputed(run, values, *tokens), (trained, frozen, *tokens)


def _recomputed_backward(run: Run, kept: Any, gradient: Any) -> Any:
    trained, frozen, x, weights, experts = kept

    def one(total: Arrays, chunk: Any) -> Any:
        x, weights, experts, gradient = chunk
        _, pull = jax.vjp(
            lambda trained, x, weights: run(trained or frozen, x, weights, experts),
            trained,
            x,
            weights,
        )
        of_matrices, *of_tokens = pull(gradient)
        wide = jax.tree.map(lambda each: each.astype(jnp.float32), of_matrices)
        return jax.tree.map(jnp.add, total, wide), of_tokens

    zeros = jax.tree.map(lambda matrix: jnp.zeros(matrix.shape, jnp.float32), trained)
    total, of_tokens = jax.lax.scan(one, zeros, (x, weights, experts, gradient))
    summed = jax.tree.map(lambda matrix, sum_: sum_.astype(matrix.dtype), trained, total)
    return summed or None, *of_tokens, None


_recomputed.defvjp(_recomputed_forward, _recomputed_backward, symbolic_zeros=True)


def _dense(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    matrices: Matrices,
    *,
    compute: Compute,
) -> jax.Array:
    """Every expert sees every token: the reference, and the cheaper one for very few tokens.
    Float32 [T, D]."""

    def one(expert: Matrices) -> jax.Array:
        gate, down, up = expert
        hidden = gated(dot(x, gate, compute=compute), dot(x, up, compute=compute))
        return dot(hidden, down, compute=compute)

    outputs = jax.lax.map(one, matrices)  # [E, T, D]
    one_hot = jax.nn.one_hot(experts, outputs.shape[0], dtype=jnp.float32)
    share = jnp.einsum("tke,tk->te", one_hot, weights)
    return jnp.einsum("te,etd->td", share, outputs.astype(jnp.float32))


def _grouped(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    matrices: Arrays,
    *,
    compute: Compute,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Tokens sorted by expert, one ragged product per matrix, for the experts from `first` on that
    the matrices hold; others add nothing. Float32 [T, D]."""
    w1, w2, w3 = matrices
    (num_tokens, per_token), num_experts = experts.shape, w1.shape[0]
    own = experts.reshape(-1) - first
    is_own = (own >= 0) & (own < num_experts)
    own = jnp.where(is_own, own, num_experts)
    # A token asks no expert twice, so this is room for all, whatever the router does.
    room = num_tokens * min(per_token, num_experts)
    order = jnp.argsort(own, stable=True)[:room]
    sizes = jnp.bincount(own, length=num_experts + 1).astype(jnp.int32)[:num_experts]
    # What lies behind the last group is undefined in a product and in its gradient.
    filled = (jnp.arange(room) < sizes.sum())[:, None]

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jnp.where(filled, _grouped_dot(rows, matrices, sizes, compute), 0).astype(x.dtype)

    rows = jnp.where(filled, x[order // per_token], 0)
    hidden = gated(product(rows, w1), product(rows, w3))
    scaled = product(hidden, w2).astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    return jnp.zeros((num_tokens, x.shape[-1]), jnp.float32).at[order // per_token].add(scaled)


def _grouped_dot(
    rows: jax.Array, matrices: jax.Array, sizes: jax.Array, compute: Compute
) -> jax.Array:
    if compute.moe == "megablox":
        return megablox.grouped_dot(rows, matrices, sizes)
    return jax.lax.ragged_dot(
        rows,
        matrices.swapaxes(1, 2),
        sizes,
        preferred_element_type=jnp.dtype(compute.accumulation_dtype),
    )


def computed_share(per_token: int, num_experts: int, parts: int) -> float:
    """The part of the rows of all grouped products that hold a token, when `parts` devices share
    the experts of a layer: what a product that leaves empty rows out computes."""
    return per_token / (parts * min(per_token, num_experts // parts))
