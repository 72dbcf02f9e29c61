"""Log-probabilities of whole sequences, for losses that compare them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import batch_parts, constrain
from llama_jax.model import transformer
from llama_jax.model.losses import Batch
from llama_jax.model.moe import RouterStats
from llama_jax.weights.dot import dot


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
        logits = dot(hidden, head, compute=compute, keep_accumulator=True).astype(jnp.float32)
        logits = constrain(logits, ("batch", None, "vocab"), compute.rules)
        # Selected by comparison, not by index: this stays local when the vocabulary is sharded.
        is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
        chosen = jnp.where(is_target, logits, 0.0).sum(axis=-1)
        found = chosen - jax.nn.logsumexp(logits, axis=-1)
        return total + (found * mask).sum(axis=-1), None

    mask = batch.loss_mask.astype(jnp.float32)
    chunks = (chunked(hidden), chunked(batch.targets), chunked(mask))
    return jax.lax.scan(body, jnp.zeros(rows, jnp.float32), chunks)[0], stats
