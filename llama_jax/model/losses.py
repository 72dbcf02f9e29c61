"""Next-token cross entropy that never holds the float32 logits of the whole batch."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import Compute, LogicalRules, ModelConfig
from llama_jax.mesh.sharding import batch_parts, constrain, loss_rules
from llama_jax.model import transformer
from llama_jax.model.moe import RouterStats
from llama_jax.weights.dot import dot
from llama_jax.weights.tensors import Leaf, LoraTensor, SavedTensor, is_quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What a training step eats; every array is [B, T].

    tokens: input ids; targets: the id each position must predict, already shifted; loss_mask: 1
    where the target counts, else 0; segment_ids: which document a token belongs to, 0 is padding;
    positions: place of each token in its document.
    """

    tokens: Any
    targets: Any
    loss_mask: Any
    segment_ids: Any
    positions: Any


def next_token_loss(
    config: ModelConfig, params: transformer.Params, batch: Batch, *, compute: Compute
) -> tuple[Float[Array, ""], Float[Array, ""], RouterStats | None]:
    """(sum of cross entropies, number of counted targets, the router's sums or None).

    Sums, not means, so that micro-batches and devices add up to the token mean.
    """
    hidden, _, stats = transformer.hidden_states(
        config,
        params,
        batch.tokens,
        compute=compute,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )
    mask = batch.loss_mask.astype(jnp.float32)
    head = transformer.head_weight(config, params)
    loss = cross_entropy(hidden, head, batch.targets, mask, compute=compute)
    return loss, mask.sum(), stats


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Leaf,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    compute: Compute,
) -> Float[Array, ""]:
    """Sum over counted positions of -log softmax(hidden @ head.T)[target], in float32.

    The positions are taken in chunks of about `compute.loss_chunk_tokens` per device. When a
    gradient is wanted it is computed with the loss, chunk by chunk, so that the largest product of
    the model runs once forward, and not again in the backward pass. On a mesh the vocabulary is
    divided, not the tokens of a chunk: see `mesh.sharding.loss_rules`.
    """
    rules = loss_rules(head.shape[0], compute.rules)
    head = dealt_head(head, rules)
    hidden, targets, mask = in_chunks(compute, hidden, targets, mask)
    return _chunked_loss(compute, rules, hidden, head, targets, mask)


def in_chunks(compute: Compute, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] as [chunks, B, t, ...], about `compute.loss_chunk_tokens` a device in
    each; the last chunk is filled up with zeros."""
    batch, length = arrays[0].shape[:2]
    tokens = batch * length // batch_parts(batch, compute.rules)
    num_chunks = min(length, math.ceil(tokens / compute.loss_chunk_tokens))
    size = math.ceil(length / num_chunks)
    filling = (0, size * num_chunks - length)

    def chunked(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), filling, *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(batch, num_chunks, size, *x.shape[2:]).swapaxes(0, 1)

    return tuple(chunked(array) for array in arrays)


def dealt_head(head: Leaf, rules: LogicalRules) -> Leaf:
    """The head with its rows where `loss_rules` wants them; quantized ones stay where they are."""
    if isinstance(head, LoraTensor):
        return dataclasses.replace(
            head,
            base=dealt_head(head.base, rules),
            lora_b=constrain(head.lora_b, ("loss_vocab", None), rules),
        )
    if isinstance(head, SavedTensor):
        return dataclasses.replace(head, saved=dealt_head(head.saved, rules))
    return head if is_quantized(head) else constrain(head, ("loss_vocab", None), rules)


def _chunk_loss(
    compute: Compute,
    rules: LogicalRules,
    hidden: jax.Array,
    head: Leaf,
    targets: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """The loss of one chunk [B, t, D]."""
    mask = constrain(mask, ("loss_batch", None), rules)
    return jnp.sum(token_losses(compute, rules, hidden, head, targets) * mask)


def token_losses(
    compute: Compute, rules: LogicalRules, hidden: jax.Array, head: Leaf, targets: jax.Array
) -> jax.Array:
    """-log softmax(hidden @ head.T)[target] in float32, [B, t]; `rules` and the head's place as
    `loss_rules` and `dealt_head` give them."""
    hidden = constrain(hidden, ("loss_batch", None, None), rules)
    targets = constrain(targets, ("loss_batch", None), rules)
    logits = dot(hidden, head, compute=compute, keep_accumulator=True).astype(jnp.float32)
    logits = constrain(logits, ("loss_batch", None, "loss_vocab"), rules)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = jnp.log(jnp.exp(logits - top).sum(axis=-1)) + top[..., 0]
    # Selected by comparison, not by index: this stays local when the vocabulary is sharded.
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    chosen = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    return total - chosen


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_loss(
    compute: Compute,
    rules: LogicalRules,
    hidden: jax.Array,
    head: Leaf,
    targets: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Sum over chunks; hidden [chunks, B, t, D], targets and mask [chunks, B, t]."""

    def body(total: jax.Array, chunk: Any) -> Any:
        h, t, m = chunk
        return total + _chunk_loss(compute, rules, h, head, t, m), None

    return jax.lax.scan(body, jnp.float32(0), (hidden, targets, mask))[0]


def _forward(
    compute: Compute, rules: LogicalRules, hidden: Any, head: Any, targets: Any, mask: Any
) -> Any:
    """Loss and its gradients together; leaves of the head that are frozen get none."""
    leaves, structure = jax.tree.flatten(head, is_leaf=lambda x: hasattr(x, "perturbed"))
    frozen = [None if leaf.perturbed else leaf.value for leaf in leaves]
    trained = [leaf.value if leaf.perturbed else None for leaf in leaves]

    def loss(h: jax.Array, trained: list[Any], t: jax.Array, m: jax.Array) -> jax.Array:
        merged = [f if v is None else v for v, f in zip(trained, frozen, strict=True)]
        return _chunk_loss(compute, rules, h, jax.tree.unflatten(structure, merged), t, m)

    def body(carry: Any, chunk: Any) -> Any:
        total, sums = carry
        part, (dh, dtrained) = jax.value_and_grad(loss, argnums=(0, 1))(
            chunk[0], trained, *chunk[1:]
        )
        sums = jax.tree.map(lambda s, d: s + d.astype(jnp.float32), sums, dtrained)
        return (total + part, sums), dh

    start = (jnp.float32(0), jax.tree.map(lambda v: jnp.zeros(v.shape, jnp.float32), trained))
    (total, sums), dhidden = jax.lax.scan(body, start, (hidden.value, targets.value, mask.value))
    sums = jax.tree.map(lambda s, v: s.astype(v.dtype), sums, trained)
    # None stands for a zero cotangent.
    return total, (dhidden, jax.tree.unflatten(structure, sums))


def _backward(compute: Compute, rules: LogicalRules, saved: Any, gradient: jax.Array) -> Any:
    del compute, rules
    dhidden, dhead = jax.tree.map(lambda d: d * gradient.astype(d.dtype), saved)
    return dhidden, dhead, None, None


_chunked_loss.defvjp(_forward, _backward, symbolic_zeros=True)
