"""Schedules, and optimizers over the trained part of the parameters alone.

The trees handled here come from `tree.partition`: frozen arrays are holes, so they have no
gradient, no moments, no update and no decay, and clipping does not see them.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.select import decay_mask
from llama_jax.weights.table import weight_table
from train.auxiliary import filled
from train.sections.optimizer import OptimizerSection
from train.sections.schedule import ScheduleSection

Schedule = Any  # update number [] int32 -> learning rate [] float32


def make_schedule(section: ScheduleSection, *, peak: float, total_steps: int) -> Schedule:
    """The learning rate of update k, counted from 0.

    Warm-up: peak * k / warmup_steps. Fall: from the peak, at the end of the warm-up (cosine,
    linear) or decay_steps before the end (wsd), to final_ratio * peak, and constant from there. A
    fall of 0 updates does not happen: the rate stays at its peak.
    """
    warmup = section.warmup_steps
    length = section.decay_steps
    if length is None:
        length = total_steps - warmup
    if section.name == "constant":
        length = 0
    begin = total_steps - length if section.name == "wsd" else warmup

    def learning_rate(count: jax.Array) -> jax.Array:
        k = jnp.asarray(count).astype(jnp.float32)
        rising = k / max(warmup, 1) if warmup else jnp.float32(1.0)
        factor = jnp.where(k < warmup, rising, 1.0)
        if length > 0:
            progress = jnp.clip((k - begin) / length, 0.0, 1.0)
            if section.name == "cosine":
                fallen = 0.5 * (1.0 + jnp.cos(math.pi * progress))
            else:
                fallen = 1.0 - progress
            fallen = section.final_ratio + (1.0 - section.final_ratio) * fallen
            factor = jnp.where(k >= max(begin, warmup), fallen, factor)
        return (peak * factor).astype(jnp.float32)

    return learning_rate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimizerState:
    """count: [] int32, updates made so far, which is what the schedule reads; inner: the moments
    and whatever else the rule keeps, for trained arrays alone."""

    count: jax.Array
    inner: Any


@dataclass(frozen=True)
class Optimizer:
    """An Optax chain, the schedule, the norm that gradients are clipped to, and whether new
    bfloat16 parameters are rounded by chance."""

    rule: optax.GradientTransformation
    schedule: Schedule
    max_grad_norm: float | None
    stochastic_rounding: bool = False

    def init(self, trained: tree.Tree) -> OptimizerState:
        return OptimizerState(jnp.zeros((), jnp.int32), self.rule.init(_wide(trained)))

    def update(
        self, gradients: tree.Tree, state: OptimizerState, trained: tree.Tree, key: jax.Array
    ) -> tuple[tree.Tree, OptimizerState, dict[str, jax.Array]]:
        """(new trained parameters, new state, learning_rate and grad_norm before clipping).

        Moments and updates are float32 whatever the parameters are; the sum is rounded once. key:
        of the run; each update draws its own from it.
        """
        gradients, wide = _wide(gradients), _wide(trained)
        norm = optax.tree.norm(gradients)
        if self.max_grad_norm is not None:
            limit = self.max_grad_norm
            scale = jnp.where(norm > limit, limit / norm, 1.0)
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        rate = self.schedule(state.count)
        # Optax raises Python floats to integer powers, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            steps, inner = self.rule.update(gradients, state.inner, wide)
        new = jax.tree.map(lambda w, u: w - rate * u, wide, steps)
        updated = self._rounded(new, trained, jax.random.fold_in(key, state.count))
        metrics = {"learning_rate": rate, "grad_norm": norm}
        return updated, OptimizerState(state.count + 1, inner), metrics

    def _rounded(self, new: tree.Tree, like: tree.Tree, key: jax.Array) -> tree.Tree:
        leaves, structure = jax.tree.flatten(new)
        rounded = [
            stochastically_rounded(leaf, jax.random.fold_in(key, index))
            if self.stochastic_rounding and old.dtype == jnp.bfloat16
            else leaf.astype(old.dtype)
            for index, (leaf, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
        ]
        return jax.tree.unflatten(structure, rounded)


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 to one of its two neighbours in bfloat16, with chances that make the mean exact
    (Zamirai et al. 2020, arXiv:2010.06192): a random number is added to the bits that are cut."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _wide(arrays: tree.Tree) -> tree.Tree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)


def make_optimizer(
    config: ModelConfig,
    params: tree.Tree,
    mask: tree.Tree,
    section: OptimizerSection,
    schedule: Schedule,
    *,
    auxiliary: tree.Tree | None = None,
) -> Optimizer:
    """The optimizer of the arrays of `params` (arrays or shape structs) that `mask` selects, and of
    those in `auxiliary`.

    Weight decay is decoupled (AdamW's) for every rule, and shrinks weights by their role; those
    beside the model do not decay.
    """
    beside = auxiliary or {}
    decays = filled(tree.partition(decay_mask(config, params), mask)[0], beside, False)
    rules = [_rule(config, params, mask, section, beside)]
    if section.weight_decay:
        # A transformation of its own and not optax.masked, whose placeholder holes would be.
        rules.append(_decayed_weights(section.weight_decay, decays))
    return Optimizer(
        optax.chain(*rules), schedule, section.max_grad_norm, section.stochastic_rounding
    )


def _decayed_weights(rate: float, decays: tree.Tree) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        added = jax.tree.map(
            lambda u, p, decay: u + rate * p if decay else u,
            updates,
            params,
            decays,
        )
        return added, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rule(
    config: ModelConfig,
    params: tree.Tree,
    mask: tree.Tree,
    section: OptimizerSection,
    beside: tree.Tree,
) -> optax.GradientTransformation:
    """Gradient to update, before decay and learning rate."""
    match section.name:
        case "adamw":
            return _adam(section)
        case "lion":
            return optax.scale_by_lion(b1=section.beta1, b2=section.beta2)
        case "adafactor":
            # Shazeer and Stern 2018 (arXiv:1804.04235) with an outside learning rate.
            return optax.chain(
                optax.scale_by_factored_rms(decay_rate=section.decay_rate, epsilon=section.epsilon),
                optax.clip_by_block_rms(1.0),
            )
        case "sgd":
            return optax.trace(decay=section.momentum) if section.momentum else optax.identity()
        case "muon":
            return _muon(config, params, mask, section, beside)


def _adam(section: OptimizerSection) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=section.beta1, b2=section.beta2, eps=section.epsilon)


def _muon(
    config: ModelConfig,
    params: tree.Tree,
    mask: tree.Tree,
    section: OptimizerSection,
    beside: tree.Tree,
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices of layers, each of a stack on its own; adam for the
    rest. A matrix's update is scaled to the size an adam update has (arXiv:2502.16982)."""
    table = weight_table(config)

    def leaf_labels(path: str, leaf: Any) -> Any:
        label = "muon" if table[path].role == "matrix" else "adam"
        return jax.tree.map(lambda _: label, leaf)

    def dimensions(leaves: tree.Tree) -> tree.Tree:
        return jax.tree.map(lambda _: MuonDimensionNumbers(-1, -2), leaves)

    labels, _ = tree.partition(tree.map_with_path(leaf_labels, params), mask)
    labels = filled(labels, beside, "adam")
    matrices = optax.chain(
        scale_by_muon(
            beta=section.momentum, eps=section.epsilon, weight_dimension_numbers=dimensions
        ),
        _matched_to_adam(),
    )
    return optax.partition({"muon": matrices, "adam": _adam(section)}, labels)


def _matched_to_adam() -> optax.GradientTransformation:
    """Times 0.2 * sqrt(max(in, out)), which gives an orthogonal matrix entries of adam's size."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
