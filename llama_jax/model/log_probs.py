"""Log-probabilities of whole sequences, for losses that compare them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import batch_parts, loss_rules
from llama_jax.model import transformer
from llama_jax.model.losses import Batch, dealt_head, token_losses
from llama_jax.model.moe import RouterStats


def sequence_log_probs(
    config: ModelConfig, params: transformer.Params, batch: Batch, *, compute: Compute
) -> tuple[Float[Array, " B"], RouterStats | None]:
    """(of each row the sum of log-probabilities of its counted targets, the router's sums).

    In float32. The positions are taken in chunks of about `compute.loss_chunk_tokens` per device,
    whose logits are computed again for the gradient: a row's part in a loss is known only when all
    of it was seen, so the gradient cannot be taken on the way, as the cross entropy does.
    """
    hidden, _, stats = transformer.hidden_states(
        config,
        params,
        batch.tokens,
        compute=compute,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )
    head = transformer.head_weight(config, params)
    rules = loss_rules(head.shape[0], compute.rules)
    head = dealt_head(head, rules)
    rows, length = batch.targets.shape
    tokens = rows * length // batch_parts(rows, compute.rules)
    num_chunks = min(length, math.ceil(tokens / compute.loss_chunk_tokens))
    size = math.ceil(length / num_chunks)
    padding = [(0, 0), (0, size * num_chunks - length)]

    def chunked(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [*padding, *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(rows, num_chunks, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def body(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        hidden, targets, mask = chunk
        losses = token_losses(compute, rules, hidden, head, targets)
        return total - (losses * mask).sum(axis=-1), None

    mask = batch.loss_mask.astype(jnp.float32)
    chunks = (chunked(hidden), chunked(batch.targets), chunked(mask))
    return jax.lax.scan(body, jnp.zeros(rows, jnp.float32), chunks)[0], stats
