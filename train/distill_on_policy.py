"""On-policy distillation: part of the rows is what the student itself goes on with.

Agarwal et al. 2023 (GKD, arXiv:2306.13649): a student that only sees other people's texts is never
corrected where its own lead it. Of a chosen row the prompt stays, the student samples the rest, and
the teacher's distributions on that are what is learned; labels count on the other rows alone. No
gradient flows through the sampling.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import constrain
from llama_jax.model import transformer
from llama_jax.model.cache import init_cache
from llama_jax.model.divergence import real_ids
from llama_jax.model.losses import Batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnPolicyBatch(Batch):
    """labelled: [B, T], the part of loss_mask whose targets are labels and no samples."""

    labelled: Any


@dataclass(frozen=True)
class OnPolicy:
    """fraction: of the rows, each by its own draw; num_ids: ids from here on are never sampled."""

    fraction: float
    temperature: float
    num_ids: int

    def __call__(
        self,
        config: ModelConfig,
        params: tree.Tree,
        batch: Batch,
        key: jax.Array,
        *,
        first_row: Any,
        compute: Compute,
    ) -> OnPolicyBatch:
        """The batch [B, T], one sample a row, with some of its rows continued by the student.

        key: of the step. Row i draws from key number first_row + i, so that the draw depends on
        the row's place in the whole batch and not on the devices.
        """
        numbers = jnp.arange(batch.tokens.shape[0]) + first_row
        keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)
        drawn = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 0), self.fraction))
        counted = batch.loss_mask > 0
        chosen = (drawn(keys) & counted.any(axis=-1))[:, None]
        # The first counted target is the first token that is the student's to say.
        prompt = jnp.argmax(counted, axis=-1) + 1
        tokens = self._continued(config, params, batch.tokens, prompt, keys, compute)
        mask, segments = _until_end(config, tokens, prompt)
        rolled = jnp.roll(tokens, -1, axis=1)
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

        def mixed(sampled: jax.Array, given: jax.Array) -> jax.Array:
            return constrain(
                jnp.where(chosen, sampled.astype(given.dtype), given),
                ("batch", "length"),
                compute.rules,
            )

        return OnPolicyBatch(
            tokens=mixed(tokens, batch.tokens),
            targets=mixed(rolled, batch.targets),
            loss_mask=mixed(mask, batch.loss_mask),
            segment_ids=mixed(segments, batch.segment_ids),
            positions=mixed(places, batch.positions),
            labelled=mixed(jnp.zeros_like(batch.loss_mask), batch.loss_mask),
        )

    def _continued(
        self,
        config: ModelConfig,
        params: tree.Tree,
        tokens: jax.Array,
        prompt: jax.Array,
        keys: jax.Array,
        compute: Compute,
    ) -> jax.Array:
        """[B, T]: each row's first `prompt` tokens, and behind them samples to the end."""
        batch, length = tokens.shape
        cache = init_cache(config, batch, length, dtype=compute.held_dtype, stacked=True)

        def body(carry: Any, place: jax.Array) -> Any:
            cache, current = carry
            logits, cache = transformer.decode(
                config, params, cache, current[:, None], compute=compute
            )
            logits = real_ids(logits, self.num_ids) / self.temperature
            draws = jax.vmap(lambda k: jax.random.fold_in(k, place))(keys)
            sampled = jax.vmap(jax.random.categorical)(draws, logits).astype(tokens.dtype)
            given = jax.lax.dynamic_index_in_dim(tokens, place, axis=1, keepdims=False)
            following = jnp.where(place < prompt, given, sampled)
            return (cache, following), following

        first = tokens[:, 0]
        _, rest = jax.lax.scan(body, (cache, first), jnp.arange(1, length))
        return jnp.concatenate([first[:, None], rest.T], axis=1)


def _until_end(
    config: ModelConfig, tokens: jax.Array, prompt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(which targets count: those behind the prompt up to the first end token, which tokens there
    are), both [B, T]; without an end token to the end of the row."""
    places = jnp.arange(tokens.shape[1])
    said = places >= prompt[:, None]
    is_end = jnp.isin(tokens, jnp.asarray(config.eos_token_id or (-1,), tokens.dtype)) & said
    ended_before = jnp.cumsum(is_end, axis=-1) - is_end.astype(jnp.int32) > 0
    there = ~ended_before
    counts = jnp.roll(said & there, -1, axis=1).at[:, -1].set(False)
    return counts, there
