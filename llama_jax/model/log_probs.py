"""Log-probabilities of whole sequences, for losses that compare them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import loss_rules
from llama_jax.model import transformer
from llama_jax.model.losses import Batch, dealt_head, in_chunks, token_losses
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

    @jax.checkpoint
    def body(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        hidden, targets, mask = chunk
        losses = token_losses(compute, rules, hidden, head, targets)
        return total - (losses * mask).sum(axis=-1), None

    mask = batch.loss_mask.astype(jnp.float32)
    chunks = in_chunks(compute, hidden, batch.targets, mask)
    start = jnp.zeros(batch.targets.shape[0], jnp.float32)
    return jax.lax.scan(body, start, chunks)[0], stats
