"""Batches that carry what a teacher thinks of their tokens, kept once for all epochs."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from llama_jax.model.losses import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TaughtBatch(Batch):
    """teacher_ids: [B, T, k], the likeliest next tokens; teacher_log_probs: [B, T, k + 1], theirs
    and behind them that of all other tokens together."""

    teacher_ids: Any
    teacher_log_probs: Any


@dataclass(frozen=True)
class Taught:
    """ids [rows, T, k] int32 and log_probs [rows, T, k + 1] float32 of all rows of a plan."""

    ids: np.ndarray
    log_probs: np.ndarray

    def of(self, batch: Batch, rows: list[int]) -> TaughtBatch:
        """The batch, whose first rows are `rows` of the plan and whose others are padding."""
        size = batch.tokens.shape[0]
        ids = np.zeros((size, *self.ids.shape[1:]), np.int32)
        log_probs = np.zeros((size, *self.log_probs.shape[1:]), np.float32)
        ids[: len(rows)] = self.ids[rows]
        log_probs[: len(rows)] = self.log_probs[rows]
        shared = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return TaughtBatch(**shared, teacher_ids=ids, teacher_log_probs=log_probs)
