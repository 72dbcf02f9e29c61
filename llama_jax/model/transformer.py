"""The Llama family as Flax modules, and the pure functions the rest of the project calls.

A module here is a thin view of a parameter subtree: it is built around the weights it is given, so
names and shapes are stated only in the weight table. The tree decides how layers run: stacked
arrays are scanned (one layer is compiled, for training and long compiles), a tuple of per-layer
trees is unrolled (no slice is copied, which on a CPU makes decoding 2.6 times faster). Both give
the same numbers. Nothing outside this file knows Flax.

What the layers are told of their tokens is made in `context.py`; which attention meets which cache
is in `layer_attention.py`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sequence import fitting, from_balanced, length_parts, to_balanced
from llama_jax.mesh.sharding import constrain
from llama_jax.model import moe, rope
from llama_jax.model.arguments import check_arguments
from llama_jax.model.cache import KVCache
from llama_jax.model.context import (
    Context,
    cached_context,
    paged_context,
    positions_of,
    sequence_context,
    slot_context,
)
from llama_jax.model.gathered import gathered_layer
from llama_jax.model.gradients import gated, in_turn, rematerialized
from llama_jax.model.layer_attention import LayerCache, attend_in_layer
from llama_jax.model.norm import mean_square
from llama_jax.model.paged_cache import PagedCache
from llama_jax.model.slot_cache import SlotCache
from llama_jax.weights.dot import dot, embed
from llama_jax.weights.leaf import Leaf

Params = tree.Tree


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, rounded, then scaled (Zhang and Sennrich 2019)."""

    def __init__(self, config: ModelConfig, params: Params):
        self.eps = config.rms_norm_eps
        self.weight = nnx.Param(params["weight"])

    def __call__(self, x: jax.Array, *, gradients_in_turn: bool = False) -> jax.Array:
        norm = in_turn(self._norm) if gradients_in_turn else self._norm
        return norm(x, self.weight.get_value())

    def _norm(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(mean_square(wide) + self.eps)
        return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


class Linear(nnx.Module):
    def __init__(self, compute: Compute, params: Params):
        self.compute = compute
        self.weight = nnx.Param(params["weight"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None

    def __call__(self, x: jax.Array, *, gradients_in_turn: bool = False) -> jax.Array:
        product: Callable[..., jax.Array] = partial(dot, compute=self.compute)
        weight = self.weight.get_value()
        if gradients_in_turn:
            product = in_turn(product)
        y = product(x, weight)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, compute: Compute, params: Params):
        self.config, self.compute = config, compute
        self.q_proj = Linear(compute, params["q_proj"])
        self.k_proj = Linear(compute, params["k_proj"])
        self.v_proj = Linear(compute, params["v_proj"])
        self.o_proj = Linear(compute, params["o_proj"])

    def __call__(
        self, x: jax.Array, context: Context, layer_cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        query = rope.rotate(self._heads(self.q_proj(x), "heads"), context.cos, context.sin)
        key = rope.rotate(self._heads(self.k_proj(x), "kv_heads"), context.cos, context.sin)
        value = self._heads(self.v_proj(x), "kv_heads")
        mixed, layer_cache = attend_in_layer(
            query, key, value, context, layer_cache, config=self.config, compute=self.compute
        )
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), layer_cache

    def _heads(self, projected: jax.Array, axis: str) -> jax.Array:
        """[B, T, N * H] -> [B, T, N, H]"""
        split = projected.reshape(*projected.shape[:2], -1, self.config.head_dim)
        return constrain(split, ("batch", "length", axis, "head_dim"), self.compute.rules)


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, compute: Compute, params: Params):
        self.gate_proj = Linear(compute, params["gate_proj"])
        self.up_proj = Linear(compute, params["up_proj"])
        self.down_proj = Linear(compute, params["down_proj"])

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.gate_proj(x), self.up_proj(x)
        # Before the gradients of gate_proj and up_proj: three whole matrices would wait for their
        # sum over the chips, and the gated product with them.
        is_whole = isinstance(self.down_proj.weight.get_value(), jax.Array)
        return self.down_proj(gated(gate, up, is_whole), gradients_in_turn=is_whole)


class SparseMoe(nnx.Module):
    """Mixtral's experts behind a float32 router."""

    def __init__(self, config: ModelConfig, compute: Compute, params: Params):
        self.config, self.compute = config, compute
        self.gate = nnx.Param(params["gate"]["weight"])
        self.w1 = nnx.Param(params["experts"]["w1"]["weight"])
        self.w2 = nnx.Param(params["experts"]["w2"]["weight"])
        self.w3 = nnx.Param(params["experts"]["w3"]["weight"])

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, moe.RouterStats]:
        assert self.config.moe is not None
        flat = x.reshape(-1, x.shape[-1])
        logits = dot(flat.astype(jnp.float32), self.gate.get_value(), compute=self.compute)
        weights, chosen, probabilities = moe.route(logits, self.config.moe.num_experts_per_tok)
        w1, w2, w3 = (weight.get_value() for weight in (self.w1, self.w2, self.w3))
        share, experts = (array.reshape(*x.shape[:-1], -1) for array in (weights, chosen))
        mixed = moe.mix(x, share, experts, w1, w2, w3, compute=self.compute)
        return mixed, moe.router_stats(chosen, probabilities, real.reshape(-1))


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, compute: Compute, params: Params):
        self.rules = compute.rules
        self.input_layernorm = RMSNorm(config, params["input_layernorm"])
        self.self_attn = Attention(config, compute, params["self_attn"])
        self.post_attention_layernorm = RMSNorm(config, params["post_attention_layernorm"])
        if config.moe is None:
            self.mlp = Mlp(compute, params["mlp"])
        else:
            self.block_sparse_moe = SparseMoe(config, compute, params["block_sparse_moe"])

    def __call__(
        self, x: jax.Array, context: Context, layer_cache: LayerCache
    ) -> tuple[jax.Array, LayerCache, moe.RouterStats | None]:
        attended, layer_cache = self.self_attn(self.input_layernorm(x), context, layer_cache)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if hasattr(self, "mlp"):
            stats = None
            x = x + self.mlp(normed)
        else:
            mixed, stats = self.block_sparse_moe(normed, context.real)
            x = x + mixed
        return constrain(x, ("batch", "length", None), self.rules), layer_cache, stats


class Llama(nnx.Module):
    """The whole model around `params`; `nnx.split` gives back a state with the same tree.

    Calling it with tokens [B, T] gives float32 logits [B, T, V].
    """

    def __init__(self, config: ModelConfig, params: Params, *, compute: Compute):
        self.config, self.compute = config, compute
        self.embed_tokens = nnx.Param(params["embed_tokens"]["weight"])
        self.norm = RMSNorm(config, params["norm"])
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nnx.Param(params["lm_head"]["weight"])
        layers = params["layers"]
        # Modules of unrolled layers are made where they run, one for all layers of one form.
        self.layers: DecoderLayer | tuple[Params, ...] = (
            DecoderLayer(config, compute, layers)
            if isinstance(layers, dict)
            else nnx.data(tuple(layers))
        )

    def __call__(self, tokens: Int[Array, "B T"], **kwargs: Any) -> Float[Array, "B T V"]:
        return self.logits(self.hidden_states(tokens, **kwargs)[0])

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | SlotCache | PagedCache | None = None,
        visible: int | None = None,
        keep_layers: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any, moe.RouterStats | None]:
        """keep_layers, without a cache: in its place, what each layer reads and the last gives."""
        rules = self.compute.rules
        parts = length_parts(rules)
        if parts > 1:
            if positions is None:
                positions = positions_of(tokens, segment_ids)
            tokens, positions = to_balanced(tokens, rules), to_balanced(positions, rules)
            segment_ids = None if segment_ids is None else to_balanced(segment_ids, rules)
        x = embed(self.embed_tokens.get_value(), tokens, compute=self.compute)
        x = constrain(x, ("batch", "length", None), rules)
        if isinstance(cache, PagedCache):
            x, cache = self._paged(x, paged_context(self.config, tokens, cache), cache)
            return self.norm(x), cache, None
        if cache is None:
            context = sequence_context(self.config, tokens, positions, segment_ids, rules)
        elif isinstance(cache, SlotCache):
            if not isinstance(self.layers, tuple):
                raise ValueError("a cache of slots wants unrolled layers; call unstack_layers")
            context = slot_context(self.config, tokens, cache)
        elif positions is None:
            context, cache = cached_context(self.config, tokens, segment_ids, cache, visible)
        else:
            raise ValueError("positions follow from the cache; pass only one of the two")
        if isinstance(self.layers, tuple):
            x, layers, stats = self._unrolled(x, context, cache)
        elif cache is None:
            first = x
            x, layers, stats = self._scanned(x, context, keep_layers)
            if keep_layers:
                states = jnp.concatenate([first[None], layers])
                return self.norm(x, gradients_in_turn=True), states, stats
        else:
            assert isinstance(cache, KVCache)
            x, layers, stats = self._scanned_cached(x, context, cache)
        if cache is not None:
            keys, values = layers
            cache = dataclasses.replace(cache, keys=keys, values=values)
        return from_balanced(self.norm(x, gradients_in_turn=True), rules), cache, stats

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        weight = self.embed_tokens if self.lm_head is None else self.lm_head
        return _logits(weight.get_value(), hidden, self.compute)

    def _unrolled(self, x: jax.Array, context: Context, cache: KVCache | SlotCache | None) -> Any:
        assert isinstance(self.layers, tuple)
        keys, values, total = [], [], None
        for index, layer in enumerate(self.layers):
            held = None if cache is None else (cache.keys[index], cache.values[index])
            x, held, stats = _run_layer(self.config, self.compute, layer, x, context, held)
            if held is not None:
                keys.append(held[0])
                values.append(held[1])
            if stats is not None:
                total = stats if total is None else jax.tree.map(jnp.add, total, stats)
        return x, (tuple(keys), tuple(values)), total

    def _paged(
        self, x: jax.Array, context: Context, cache: PagedCache
    ) -> tuple[jax.Array, PagedCache]:
        """The layers hand the pages on from one to the next, so that they are updated in place."""
        if isinstance(self.layers, tuple):
            for layer in self.layers:
                x, cache, _ = _run_layer(self.config, self.compute, layer, x, context, cache)
            return x, dataclasses.replace(cache, layer=jnp.int32(0))
        graph, stacked = nnx.split(self.layers)

        def body(carry: tuple[jax.Array, PagedCache], state: Any) -> Any:
            x, cache, _ = nnx.merge(graph, state)(carry[0], context, carry[1])
            return (x, cache), None

        (x, cache), _ = jax.lax.scan(body, (x, cache), stacked)
        return x, dataclasses.replace(cache, layer=jnp.int32(0))

    def _scanned(self, x: jax.Array, context: Context, keep_layers: bool) -> Any:
        config, compute = self.config, self.compute
        assert isinstance(self.layers, DecoderLayer)
        graph, stacked = nnx.split(self.layers)

        def layer(state: Any, x: jax.Array, context: Context) -> Any:
            return nnx.merge(graph, gathered_layer(config, compute, state))(x, context, None)

        run = rematerialized(layer, compute)

        def body(x: jax.Array, state: Any) -> Any:
            x, _, stats = run(state, x, context)
            return x, (x if keep_layers else None, stats)

        x, (layers, stats) = jax.lax.scan(body, x, stacked)
        return x, layers, jax.tree.map(lambda each: each.sum(axis=0), stats)

    def _scanned_cached(self, x: jax.Array, context: Context, cache: KVCache) -> Any:
        assert isinstance(self.layers, DecoderLayer)
        graph, stacked = nnx.split(self.layers)

        # The cache is carried, not scanned over, so that it is updated in place.
        def body(carry: Any, state: Any) -> Any:
            x, keys, values, index = carry
            held = jax.tree.map(lambda array: array[index], (keys, values))
            x, written, stats = nnx.merge(graph, state)(x, context, held)
            assert written is not None
            keys, values = jax.tree.map(
                lambda array, new: jax.lax.dynamic_update_index_in_dim(array, new, index, 0),
                (keys, values),
                written,
            )
            return (x, keys, values, index + 1), stats

        carry = (x, cache.keys, cache.values, jnp.int32(0))
        (x, keys, values, _), stats = jax.lax.scan(body, carry, stacked)
        return x, (keys, values), jax.tree.map(lambda each: each.sum(axis=0), stats)


@partial(jax.jit, static_argnums=(0, 1))
def _run_layer(
    config: ModelConfig,
    compute: Compute,
    params: Params,
    x: jax.Array,
    context: Context,
    held: LayerCache,
) -> Any:
    """One of unrolled layers. Jitted for itself so that layers of one form are traced and lowered
    once, which is most of the time of a start; XLA puts them in line again."""
    run = rematerialized(lambda p, *rest: DecoderLayer(config, compute, p)(*rest), compute)
    return run(params, x, context, held)


def _logits(weight: Leaf, hidden: jax.Array, compute: Compute) -> jax.Array:
    wide = dot(hidden, weight, compute=compute, keep_accumulator=True)
    axes = ("batch", "length", "vocab") if wide.ndim == 3 else ("batch", "vocab")
    return constrain(wide.astype(jnp.float32), axes, compute.rules)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    compute: Compute,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | SlotCache | PagedCache | None = None,
    visible: int | None = None,
) -> tuple[Float[Array, "B T D"], Any, moe.RouterStats | None]:
    """Final normed states, the advanced cache, and the router's sums (None without experts).
    A cache of slots wants layers that are unrolled; with one of pages there are no router's sums.

    segment_ids: 0 is padding, equal ids attend to each other; with a cache they only say how many
    tokens of each row are real (a prefix of it). visible: how many leading slots of the cache to
    look at, static; the caller knows that the rest is empty. None means all. The mesh divides
    sequences only without a cache and where their length allows it.
    """
    compute = fitting(compute, tokens.shape[1] if cache is None else 1)
    model = Llama(config, params, compute=compute)
    return model.hidden_states(
        tokens, positions=positions, segment_ids=segment_ids, cache=cache, visible=visible
    )


def layer_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    compute: Compute,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "layers B T D"], moe.RouterStats | None]:
    """As `hidden_states`, with what each layer reads in place of the cache, and behind it what the
    last one gives. For stacked layers and sequences that no mesh divides."""
    if length_parts(compute.rules) > 1:
        raise ValueError("what layers read is in the order of the text only where it is undivided")
    model = Llama(config, params, compute=compute)
    return model.hidden_states(
        tokens, positions=positions, segment_ids=segment_ids, keep_layers=True
    )


def head_weight(config: ModelConfig, params: Params) -> Leaf:
    """The output projection [V, D]: the embedding itself when tied."""
    return params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]


def logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "*B D"], *, compute: Compute
) -> Float[Array, "*B V"]:
    """Float32 logits of normed hidden states."""
    compute = fitting(compute, hidden.shape[-2] if hidden.ndim > 2 else 1)
    return _logits(head_weight(config, params), hidden, compute)


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    compute: Compute | None = None,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits of every position. Plain function of arrays: jit, grad and vmap it.

    Raises ValueError, naming it, for an argument of another type or shape.
    """
    compute = Compute() if compute is None else compute
    check_arguments(config, params, compute, tokens, positions=positions, segment_ids=segment_ids)
    hidden, _, _ = hidden_states(
        config, params, tokens, compute=compute, positions=positions, segment_ids=segment_ids
    )
    return logits(config, params, hidden, compute=compute)


def decode(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    compute: Compute,
    num_real: Int[Array, " B"] | None = None,
    visible: int | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Runs `tokens` after what `cache` holds; logits follow each row's last real token.

    num_real: how many of the T tokens of each row are real, the rest being padding on the right;
    None means all. visible: as in `hidden_states`, at least cursor + T. Donate the cache when
    jitting this.
    """
    length = tokens.shape[1]
    segment_ids = None
    if num_real is not None:
        segment_ids = (jnp.arange(length) < num_real[:, None]).astype(jnp.int32)
    hidden, cache_after, _ = hidden_states(
        config,
        params,
        tokens,
        compute=compute,
        segment_ids=segment_ids,
        cache=cache,
        visible=visible,
    )
    assert cache_after is not None
    if num_real is None:
        last = hidden[:, -1]
    else:
        last = jnp.take_along_axis(hidden, (num_real - 1)[:, None, None], axis=1)[:, 0]
    return logits(config, params, last, compute=compute), cache_after
