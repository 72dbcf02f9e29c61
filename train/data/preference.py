"""Batches of preference pairs that carry what the reference model thinks of them."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from llama_jax.model.losses import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """reference: [2B, T] float32, whose sum over a row is the log-probability of the row's counted
    targets under the reference; laid out as the other arrays are, so that it is placed as they
    are."""

    reference: Any


def with_reference(batch: Batch, log_probs: np.ndarray) -> PreferenceBatch:
    """log_probs: [2B], of each row."""
    reference = np.zeros(batch.tokens.shape, np.float32)
    reference[:, 0] = log_probs
    return PreferenceBatch(
        **{field.name: getattr(batch, field.name) for field in fields(batch)}, reference=reference
    )
