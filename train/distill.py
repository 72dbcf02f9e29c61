"""Distillation: a loss that draws a student's distributions to a teacher's.

    loss = (1 - soft_weight) * cross entropy of the labels + soft_weight * T^2 * divergence
           + weights * losses of layers (`distill_layers`)

The teacher's parameters stand beside the state: they are never differentiated, have no optimizer
state and are not saved with the run. Both models' logits exist for one chunk of positions at a time
(`model.chunked`), with the vocabulary divided over the mesh as in the cross entropy.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import Compute, LogicalRules, ModelConfig
from llama_jax.mesh.sharding import constrain, loss_rules
from llama_jax.model import transformer
from llama_jax.model.chunked import chunked_sums
from llama_jax.model.divergence import divergences, real_ids, same_ids, top_divergences
from llama_jax.model.losses import Batch, dealt_head, in_chunks
from llama_jax.weights.dot import dot
from llama_jax.weights.leaf import Leaf
from train.data.taught import TaughtBatch
from train.distill_layers import Side, attention_loss, hidden_loss, layer_pairs
from train.distill_on_policy import OnPolicyBatch
from train.sections.distill import DistillSection, RampSection
from train.step import LossSums


@dataclass(frozen=True)
class Teacher:
    """What is learned from. params: shape structs or arrays; num_ids: how many ids stand for
    tokens, which is where both vocabularies' padding begins."""

    config: ModelConfig
    params: tree.Tree
    num_ids: int


def ramp(value: float | RampSection, step: Any, total_steps: int) -> jax.Array:
    """The value of a number that may follow a schedule, at the step counted from 0."""
    if not isinstance(value, RampSection):
        return jnp.float32(value)
    length = value.steps or total_steps
    done = jnp.clip(jnp.asarray(step).astype(jnp.float32) / max(length, 1), 0.0, 1.0)
    return value.start + (value.end - value.start) * done


@dataclass(frozen=True)
class DistillLoss:
    """The loss of a batch [B, T], in sums over counted targets.

    Means beside the loss: hard_loss, the cross entropy; soft_loss, the divergence times T^2; and in
    evaluations kl, KL(teacher || student) at temperature 1, and agreement, how often both find the
    same token likeliest. Losses of layers, hidden_loss and attention_loss, are of training alone.
    """

    section: DistillSection
    teacher: ModelConfig
    num_ids: int
    total_steps: int

    def __call__(
        self,
        config: ModelConfig,
        params: tree.Tree,
        batch: Batch,
        teacher: tree.Tree,
        *,
        step: jax.Array,
        compute: Compute,
        measure: bool = False,
        auxiliary: tree.Tree | None = None,
    ) -> LossSums:
        hidden, states, stats = _hidden(config, params, batch, compute, bool(auxiliary))
        numbers = tuple(
            ramp(value, step, self.total_steps)
            for value in (self.section.soft_weight, self.section.temperature)
        )
        mask = batch.loss_mask.astype(jnp.float32)
        if isinstance(batch, TaughtBatch):
            head = transformer.head_weight(config, params)
            rules = loss_rules(head.shape[0], compute.rules)
            kept = _KeptChunk(self.section, self.num_ids, compute, rules, measure)
            outputs = (batch.teacher_ids, batch.teacher_log_probs)
            pieces = in_chunks(compute, hidden, *outputs, batch.targets, mask)
            loss, means = chunked_sums(
                kept, pieces[0], dealt_head(head, rules), pieces[1:], numbers
            )
            return LossSums(loss=loss, weight=mask.sum(), stats=stats, means=means)
        teacher = jax.lax.stop_gradient(teacher)
        taught, their_states, _ = jax.lax.stop_gradient(
            _hidden(self.teacher, teacher, batch, compute, bool(auxiliary))
        )
        heads: list[Leaf] = [
            transformer.head_weight(config, params),
            transformer.head_weight(self.teacher, teacher),
        ]
        ours, theirs = (loss_rules(head.shape[0], compute.rules) for head in heads)
        heads = [dealt_head(head, r) for head, r in zip(heads, (ours, theirs), strict=True)]
        chunk = _Chunk(self.section, self.num_ids, compute, ours, theirs, measure)
        labelled = batch.labelled if isinstance(batch, OnPolicyBatch) else batch.loss_mask
        labelled = labelled.astype(jnp.float32)
        pieces = in_chunks(compute, hidden, taught, batch.targets, mask, labelled)
        loss, means = chunked_sums(chunk, pieces[0], heads[0], pieces[1:], (heads[1], *numbers))
        if auxiliary:
            sides = Side(config, params, states), Side(self.teacher, teacher, their_states)
            more, seen = self._of_layers(auxiliary, *sides, batch, step, compute)
            loss, means = loss + more, {**means, **seen}
        return LossSums(loss=loss, weight=mask.sum(), stats=stats, means=means)

    def _of_layers(
        self,
        auxiliary: tree.Tree,
        student: Side,
        teacher: Side,
        batch: Batch,
        step: jax.Array,
        compute: Compute,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(the weighted sum, each loss without its weight)."""
        total, means = jnp.float32(0), {}
        configs = student.config, teacher.config
        mask = batch.loss_mask.astype(jnp.float32)
        if self.section.hidden is not None:
            pairs = layer_pairs(self.section.hidden, *configs, name="hidden")
            found = hidden_loss(auxiliary["hidden_projection"], pairs, student, teacher, mask)
            total += ramp(self.section.hidden.weight, step, self.total_steps) * found
            means["hidden_loss"] = found
        if self.section.attention is not None:
            pairs = layer_pairs(self.section.attention, *configs, name="attention")
            mixture = auxiliary["attention_mixture"]
            found = attention_loss(mixture, pairs, student, teacher, batch, compute=compute)
            total += ramp(self.section.attention.weight, step, self.total_steps) * found
            means["attention_loss"] = found
        return total, means


def _hidden(
    config: ModelConfig, params: tree.Tree, batch: Batch, compute: Compute, with_layers: bool
) -> tuple[jax.Array, Any, Any]:
    """(normed states, what the layers read if that is wanted, sums of the router)."""
    run = transformer.layer_states if with_layers else transformer.hidden_states
    return run(
        config,
        params,
        batch.tokens,
        compute=compute,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )


@dataclass(frozen=True)
class _Chunk:
    """The sums of one chunk of positions."""

    section: DistillSection
    num_ids: int
    compute: Compute
    student_rules: LogicalRules
    teacher_rules: LogicalRules
    measure: bool

    def __call__(
        self, hidden: jax.Array, head: Leaf, part: Any, constants: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        taught, targets, mask, labelled = part
        teacher_head, soft_weight, temperature = constants
        mask = constrain(mask, ("loss_batch", None), self.student_rules)
        counted = mask > 0
        student = _logits(self.compute, hidden, head, self.student_rules)
        teacher = _logits(self.compute, taught, teacher_head, self.teacher_rules)
        # What does not count may hold anything, also what is not finite.
        teacher = jnp.where(counted[..., None], teacher, 0.0)
        labelled = constrain(labelled, ("loss_batch", None), self.student_rules)
        hard = jnp.sum(_cross_entropy(student, targets) * labelled)
        student, teacher = same_ids(student, teacher, self.num_ids)
        soft = jnp.sum(
            mask
            * divergences(student, teacher, kind=self.section.divergence, temperature=temperature)
        )
        means = {"hard_loss": hard, "soft_loss": soft}
        if self.measure:
            means["kl"] = jnp.sum(mask * divergences(student, teacher, kind="forward_kl"))
            same = student.argmax(axis=-1) == teacher.argmax(axis=-1)
            means["agreement"] = jnp.sum(mask * same.astype(jnp.float32))
        return (1.0 - soft_weight) * hard + soft_weight * soft, means


@dataclass(frozen=True)
class _KeptChunk:
    """The sums of one chunk whose teacher is known by its kept outputs."""

    section: DistillSection
    num_ids: int
    compute: Compute
    rules: LogicalRules
    measure: bool

    def __call__(
        self, hidden: jax.Array, head: Leaf, part: Any, constants: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids, log_probs, targets, mask = part
        soft_weight, temperature = constants
        mask = constrain(mask, ("loss_batch", None), self.rules)
        logits = _logits(self.compute, hidden, head, self.rules)
        hard = jnp.sum(_cross_entropy(logits, targets) * mask)
        each = top_divergences(
            logits,
            ids,
            log_probs,
            num_ids=self.num_ids,
            kind=self.section.divergence,
            temperature=temperature,
        )
        soft = jnp.sum(each * mask)
        means = {"hard_loss": hard, "soft_loss": soft}
        if self.measure:
            same = real_ids(logits, self.num_ids).argmax(axis=-1) == ids[..., 0]
            means["agreement"] = jnp.sum(mask * same.astype(jnp.float32))
        return (1.0 - soft_weight) * hard + soft_weight * soft, means


def _logits(compute: Compute, hidden: jax.Array, head: Leaf, rules: LogicalRules) -> jax.Array:
    hidden = constrain(hidden, ("loss_batch", None, None), rules)
    logits = dot(hidden, head, compute=compute, keep_accumulator=True)
    return constrain(logits.astype(jnp.float32), ("loss_batch", None, "loss_vocab"), rules)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], as `losses.token_losses` has it."""
    total = jax.nn.logsumexp(logits, axis=-1)
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    return total - jnp.where(is_target, logits, 0.0).sum(axis=-1)
