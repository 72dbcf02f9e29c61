"""Next-token cross entropy that never holds the float32 logits of the whole batch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.config import Compute, LogicalRules, ModelConfig
from llama_jax.mesh.sequence import length_parts
from llama_jax.mesh.sharding import (
    batch_parts,
    constrain,
    loss_rules,
    partition_spec,
    reduce_scattered,
)
from llama_jax.model import transformer
from llama_jax.model.chunked import chunked_sums
from llama_jax.model.moe import RouterStats
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.dot import dot
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.tensors import TappedTensor


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

    The positions are taken in chunks of about `compute.loss_chunk_tokens` per device, and their
    gradient with them: see `model.chunked`. On a mesh the vocabulary is divided, not the tokens of
    a chunk: see `mesh.sharding.loss_rules`.
    """
    rules = loss_rules(head.shape[0], compute.rules)
    head = dealt_head(head, rules)

    def chunk(hidden: jax.Array, head: Leaf, part: Any, constants: None) -> tuple[jax.Array, None]:
        targets, mask = part
        mask = constrain(mask, ("loss_batch", None), rules)
        return jnp.sum(token_losses(compute, rules, hidden, head, targets) * mask), None

    hidden, targets, mask = in_chunks(compute, hidden, targets, mask)
    return chunked_sums(chunk, hidden, head, (targets, mask), None)[0]


def in_chunks(compute: Compute, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] as [chunks, B, t, ...], about `compute.loss_chunk_tokens` a device in
    each; the last chunk is filled up with zeros."""
    batch, length = arrays[0].shape[:2]
    # Where the mesh divides sequences, a chunk takes something of every part.
    parts = length_parts(compute.rules)
    parts = parts if length % parts == 0 else 1
    length //= parts
    tokens = batch * length // batch_parts(batch, compute.rules)
    num_chunks = min(length, math.ceil(tokens / compute.loss_chunk_tokens))
    size = math.ceil(length / num_chunks)
    filling = (0, size * num_chunks - length)

    def chunked(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        x = x.reshape(batch, parts, length, *rest)
        x = jnp.pad(x, [(0, 0), (0, 0), filling, *[(0, 0)] * len(rest)])
        x = jnp.moveaxis(x.reshape(batch, parts, num_chunks, size, *rest), 2, 0)
        return x.reshape(num_chunks, batch, parts * size, *rest)

    return tuple(chunked(array) for array in arrays)


def dealt_head(head: Leaf, rules: LogicalRules) -> Leaf:
    """The head with its rows where `loss_rules` wants them, and its gradient where the weight is,
    or the optimizer would follow the gradient, with moments and all; quantized ones stay where they
    are."""
    if isinstance(head, LoraTensor):
        return dataclasses.replace(
            head,
            base=dealt_head(head.base, rules),
            lora_b=_dealt(head.lora_b, ("vocab", "rank"), rules),
        )
    if isinstance(head, SavedTensor):
        return dataclasses.replace(head, saved=dealt_head(head.saved, rules))
    if isinstance(head, TappedTensor):
        parts = (_dealt(part, ("vocab", "embed"), rules) for part in (head.array, head.tap))
        return TappedTensor(*parts)
    return head if is_quantized(head) else _dealt(head, ("vocab", "embed"), rules)


def _dealt(rows: jax.Array, axes: tuple[str, str], rules: LogicalRules) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return rows
    dealt = ("loss_vocab", None)
    moved = reduce_scattered(rows, partition_spec(dealt, rules), partition_spec(axes, rules))
    # Said again for the gradient, which is summed over the chunks here and travels once, at the
    # end.
    return constrain(moved, dealt, rules)


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
