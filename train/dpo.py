"""Direct preference optimization: a loss over pairs of rows.

Rafailov et al. 2023 (arXiv:2305.18290): -log sigmoid(beta * h), where h is how much more the model
prefers the chosen answer to the rejected one than the reference does:

    h = (log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected))

A batch holds the two rows of a pair next to each other, chosen first: [2B, T].
"""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.model.log_probs import sequence_log_probs
from llama_jax.model.losses import Batch
from llama_jax.weights.lora import remove_lora
from train.data.preference import PreferenceBatch
from train.sections.dpo import DpoSection
from train.step import Loss, LossSums


def make_dpo_loss(section: DpoSection) -> Loss:
    """The loss of a batch [2B, T]; sums over pairs, whose number is the weight.

    A pair counts if both its rows have counted tokens, which padding has not. Means beside the
    loss: reward_chosen and reward_rejected (beta times the log-ratio to the reference),
    reward_margin (their difference) and reward_accuracy (the part of pairs whose margin is
    positive). With ipo every log-probability is the mean of a token, as the rewards then are too.

    The reference stands in the batch (a `PreferenceBatch`), or is the model without its adapters.
    """

    def loss(config: ModelConfig, params: tree.Tree, batch: Batch, *, compute: Compute) -> LossSums:
        found, stats = sequence_log_probs(config, params, batch, compute=compute)
        ratio = found - _reference(config, params, batch, compute)
        lengths = batch.loss_mask.astype(jnp.float32).sum(axis=-1)
        if section.loss == "ipo":
            ratio = ratio / jnp.maximum(lengths, 1.0)
        chosen, rejected = ratio.reshape(-1, 2).T
        counts = (lengths.reshape(-1, 2) > 0).all(axis=-1)

        def total(values: Any) -> jax.Array:
            return jnp.where(counts, values, 0.0).sum()

        margin = section.beta * (chosen - rejected)
        return LossSums(
            loss=total(pair_losses(section, chosen - rejected)),
            weight=counts.astype(jnp.float32).sum(),
            stats=stats,
            means={
                "reward_chosen": total(section.beta * chosen),
                "reward_rejected": total(section.beta * rejected),
                "reward_margin": total(margin),
                "reward_accuracy": total((margin > 0).astype(jnp.float32)),
            },
        )

    return loss


def pair_losses(section: DpoSection, h: jax.Array) -> jax.Array:
    """The loss of each pair from its h (see above)."""
    if section.loss == "ipo":  # Azar et al. 2023 (arXiv:2310.12036), equation 17
        return jnp.square(h - 1.0 / (2.0 * section.beta))
    if section.loss == "hinge":  # Zhao et al. 2023 (arXiv:2305.10425)
        return jax.nn.relu(1.0 - section.beta * h)
    # With smoothing: a pair is labelled right with probability 1 - label_smoothing.
    right, wrong = -jax.nn.log_sigmoid(section.beta * h), -jax.nn.log_sigmoid(-section.beta * h)
    return (1.0 - section.label_smoothing) * right + section.label_smoothing * wrong


def _reference(config: ModelConfig, params: tree.Tree, batch: Batch, compute: Compute) -> jax.Array:
    """Log-probabilities [2B] under the reference; no gradient flows into them."""
    if isinstance(batch, PreferenceBatch):
        return batch.reference.sum(axis=-1)
    bare = remove_lora(jax.lax.stop_gradient(params))
    return jax.lax.stop_gradient(sequence_log_probs(config, bare, batch, compute=compute)[0])
