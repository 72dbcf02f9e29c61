"""Mixtral's sparse mixture of experts: routing, two ways to run it, and the balancing loss.

Nothing is dropped: every token reaches its experts whatever the others chose, so a token's result
does not depend on the batch it is in.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import Compute
from llama_jax.weights.dot import dot
from llama_jax.weights.tensors import Leaf, to_array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """Sums over tokens: how often each expert was the k-th choice [k, E], the router's
    probabilities [E], and the number of tokens []. Layers add up."""

    chosen: Float[Array, "k E"]
    probability: Float[Array, " E"]
    num_tokens: Float[Array, ""]


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
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    experts: Int[Array, "T k"],
    w1: Leaf,
    w2: Leaf,
    w3: Leaf,
    *,
    compute: Compute,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts; w1, w3: [E, F, D], w2: [E, D, F]."""
    run = _grouped if compute.moe == "grouped" else _dense
    return run(x, weights, experts, w1, w2, w3, compute)


def _dense(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    w1: Leaf,
    w2: Leaf,
    w3: Leaf,
    compute: Compute,
) -> jax.Array:
    """Every expert sees every token: the reference, and the cheaper one for very few tokens."""

    def one(expert: tuple[Leaf, Leaf, Leaf]) -> jax.Array:
        gate, down, up = expert
        hidden = jax.nn.silu(dot(x, gate, compute=compute)) * dot(x, up, compute=compute)
        return dot(hidden, down, compute=compute)

    outputs = jax.lax.map(one, (w1, w2, w3))  # [E, T, D]
    one_hot = jax.nn.one_hot(experts, outputs.shape[0], dtype=jnp.float32)
    share = jnp.einsum("tke,tk->te", one_hot, weights)
    return jnp.einsum("te,etd->td", share, outputs.astype(jnp.float32)).astype(x.dtype)


def _grouped(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    w1: Leaf,
    w2: Leaf,
    w3: Leaf,
    compute: Compute,
) -> jax.Array:
    """Tokens sorted by expert, one ragged product per matrix."""
    num_tokens, per_token = experts.shape
    order = jnp.argsort(experts.reshape(-1), stable=True)
    rows = x[order // per_token]
    sizes = jnp.bincount(experts.reshape(-1), length=w1.shape[0]).astype(jnp.int32)

    def product(rows: jax.Array, weight: Leaf) -> jax.Array:
        matrix: Any = to_array(weight, dtype=x.dtype)
        out = jax.lax.ragged_dot(
            rows,
            matrix.swapaxes(1, 2),
            sizes,
            preferred_element_type=jnp.dtype(compute.accumulation_dtype),
        )
        return out.astype(x.dtype)

    hidden = jax.nn.silu(product(rows, w1)) * product(rows, w3)
    scaled = product(hidden, w2).astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    mixed = jnp.zeros((num_tokens, x.shape[-1]), jnp.float32).at[order // per_token].add(scaled)
    return mixed.astype(x.dtype)
