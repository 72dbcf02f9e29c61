"""Losses of single layers: a student's hidden states and attention maps drawn to its teacher's.

    hidden     of each pair of layers: |P h - t|^2 / |t|^2 of what they put out for a token, with a
               learned projection P [teacher's D, student's D]. Relative, because a few tokens have
               states a thousand times as long as others. (FitNets, Romero et al. 2015,
               arXiv:1412.6550)
    attention  KL(teacher's map || mixture of the student's) of each of the teacher's heads, over
               the keys of a token, the mean over heads. The mixture is learned, so that heads need
               neither be as many nor in the same order. (After TinyBERT, Jiao et al. 2020,
               arXiv:1909.10351)

Both are means over pairs and sums over counted tokens. Maps are computed anew from what a layer
reads, whatever kernel the model runs with, for one pair of layers at a time.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.kernels.few_rows import MASKED
from llama_jax.model import rope, transformer
from llama_jax.model.attention import causal_mask
from llama_jax.model.losses import Batch
from train.sections.distill import DistillSection, LayerLossSection

_LEAST_PROBABILITY = 1e-30
# How much of a teacher's map the student's own counterpart is at first: e^4 of e^4 + N - 1.
_FIRST_LOGIT = 4.0


def layer_pairs(
    section: LayerLossSection, student: ModelConfig, teacher: ModelConfig, *, name: str
) -> tuple[tuple[int, int], ...]:
    """(layer of the student, layer of the teacher), from 0. By default each of the student's: the
    teacher's are spread evenly, the last belongs to the last.

    Raises ValueError for layers that are not there.
    """
    ours, theirs = student.num_hidden_layers, teacher.num_hidden_layers
    if section.layers is None:
        return tuple((i, math.ceil((i + 1) * theirs / ours) - 1) for i in range(ours))
    for pair in section.layers:
        for number, count, whose in zip(pair, (ours, theirs), ("student", "teacher"), strict=True):
            if number >= count:
                raise ValueError(
                    f"distill.{name}.layers pairs {list(pair)}, but the {whose} has {count} "
                    f"layers, counted from 0"
                )
    return section.layers


def init_auxiliary(
    section: DistillSection, student: ModelConfig, teacher: ModelConfig
) -> tree.Tree:
    """Projections that keep channels as they are, and mixtures that are nearly one head each."""
    found = {}
    if section.hidden is not None:
        count = len(layer_pairs(section.hidden, student, teacher, name="hidden"))
        same = jnp.eye(teacher.hidden_size, student.hidden_size, dtype=jnp.float32)
        found["hidden_projection"] = jnp.tile(same, (count, 1, 1))
    if section.attention is not None:
        count = len(layer_pairs(section.attention, student, teacher, name="attention"))
        ours, theirs = student.num_attention_heads, teacher.num_attention_heads
        nearest = jnp.arange(theirs) * ours // theirs
        logits = _FIRST_LOGIT * jax.nn.one_hot(nearest, ours, dtype=jnp.float32)
        found["attention_mixture"] = jnp.tile(logits, (count, 1, 1))
    return found


@dataclass(frozen=True)
class Side:
    """A model and what its layers read, [L + 1, B, T, D], the last being what the norm reads."""

    config: ModelConfig
    params: tree.Tree
    states: jax.Array


def hidden_loss(
    projection: jax.Array,
    pairs: tuple[tuple[int, int], ...],
    student: Side,
    teacher: Side,
    mask: jax.Array,
) -> jax.Array:
    """Sum over tokens [B, T] that `mask` counts, mean over pairs; projection [pairs, D', D]."""
    ours, theirs = _columns(pairs)

    def one(total: jax.Array, pair: Any) -> tuple[jax.Array, None]:
        matrix, i, j = pair
        wanted = jax.lax.stop_gradient(teacher.states[j + 1].astype(jnp.float32))
        found = jnp.einsum("btd,ed->bte", student.states[i + 1].astype(jnp.float32), matrix)
        size = jnp.maximum(jnp.square(wanted).sum(axis=-1), _LEAST_PROBABILITY)
        each = jnp.square(found - wanted).sum(axis=-1) / size
        return total + _sum(each, mask), None

    total, _ = jax.lax.scan(jax.checkpoint(one), jnp.float32(0), (projection, ours, theirs))
    return total / len(pairs)


def attention_loss(
    mixture: jax.Array,
    pairs: tuple[tuple[int, int], ...],
    student: Side,
    teacher: Side,
    batch: Batch,
    *,
    compute: Compute,
) -> jax.Array:
    """The same of attention maps; mixture: logits [pairs, teacher's N, student's N]."""
    ours, theirs = _columns(pairs)
    mask = batch.loss_mask.astype(jnp.float32)

    def one(total: jax.Array, pair: Any) -> tuple[jax.Array, None]:
        logits, i, j = pair
        wanted = jax.lax.stop_gradient(attention_map(teacher, j, batch, compute=compute))
        found = attention_map(student, i, batch, compute=compute)
        mixed = jnp.einsum("nm,bmts->bnts", jax.nn.softmax(logits, axis=-1), found)
        ratio = jnp.log(jnp.maximum(wanted, _LEAST_PROBABILITY)) - jnp.log(
            jnp.maximum(mixed, _LEAST_PROBABILITY)
        )
        each = (wanted * ratio).sum(axis=-1).mean(axis=1)
        return total + _sum(each, mask), None

    total, _ = jax.lax.scan(jax.checkpoint(one), jnp.float32(0), (mixture, ours, theirs))
    return total / len(pairs)


def attention_map(side: Side, layer: Any, batch: Batch, *, compute: Compute) -> jax.Array:
    """[B, N, T, T]: the weights of every head of one layer, float32."""
    config = side.config
    weights = jax.tree.map(lambda leaf: leaf[layer], side.params["layers"])
    normed = transformer.RMSNorm(config, weights["input_layernorm"])(side.states[layer])
    positions = jnp.where(batch.segment_ids > 0, batch.positions, 0)
    cos, sin = rope.angles(config, positions)

    def heads(name: str) -> jax.Array:
        projected = transformer.Linear(compute, weights["self_attn"][name])(normed)
        split = projected.reshape(*projected.shape[:2], -1, config.head_dim)
        return rope.rotate(split, cos, sin)

    query, key = heads("q_proj"), heads("k_proj")
    key = jnp.repeat(key, config.num_query_groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    places = jnp.arange(normed.shape[1], dtype=jnp.int32)[None]
    mask = causal_mask(
        places,
        places,
        sliding_window=config.sliding_window,
        query_segments=batch.segment_ids,
        key_segments=batch.segment_ids,
    )
    scores = jnp.where(mask[:, None], scores * config.head_dim**-0.5, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def _columns(pairs: tuple[tuple[int, int], ...]) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray([i for i, _ in pairs]), jnp.asarray([j for _, j in pairs])


def _sum(each: jax.Array, mask: jax.Array) -> jax.Array:
    # What does not count may hold anything, also what is not finite.
    return jnp.sum(jnp.where(mask > 0, each * mask, 0.0))
