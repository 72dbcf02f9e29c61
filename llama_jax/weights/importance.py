"""What matters in a model: the sizes of the inputs of its weights, and how much each layer changes.

The model is run layer by layer over unlabelled rows, and only sums are kept. The input of o_proj is
read by giving the attention an identity in its place, which multiplies by one.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.model import moe, rope, transformer
from llama_jax.model.attention import causal_mask
from llama_jax.weights.cut import check_plain
from llama_jax.weights.dot import dot, embed


@dataclass(frozen=True)
class Importance:
    """squares: path -> [L, in], or [L, E, in] of experts, sum over tokens of the squared inputs of
    a weight; influence: [L], the mean of 1 - cos(what goes into a layer, what comes out), after
    Men et al. 2024 (ShortGPT, arXiv:2403.03853): 0 for a layer that does nothing; tokens: how many
    were looked at."""

    squares: dict[str, np.ndarray]
    influence: np.ndarray
    tokens: int


def measure(
    config: ModelConfig, params: tree.Tree, rows: Iterable[np.ndarray], *, compute: Compute
) -> Importance:
    """Runs `rows`, token ids of any length each, in batches of one.

    Raises ValueError when there is no row, and for quantized or adapted weights.
    """
    check_plain(params)
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        for i in range(config.num_hidden_layers)
    ]
    run = jax.jit(functools.partial(_layer, config, compute))
    totals: list[Any] = [None] * len(layers)
    tokens = 0
    for row in rows:
        ids, real = _padded(row)
        x = embed(params["embed_tokens"]["weight"], ids, compute=compute)
        for number, layer in enumerate(layers):
            x, sums = run(layer, x, real)
            before = totals[number]
            totals[number] = sums if before is None else jax.tree.map(jnp.add, before, sums)
        tokens += len(row)
    if not tokens:
        raise ValueError("there is nothing to calibrate with: no row has a token")
    stacked = jax.tree.map(lambda *each: np.stack([np.asarray(x) for x in each]), *totals)
    return Importance(stacked["squares"], stacked["change"] / tokens, tokens)


def _padded(row: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """[1, T] ids and which are real; lengths are powers of two, so that few programs are made."""
    length = max(16, 1 << (len(row) - 1).bit_length())
    ids = np.zeros((1, length), np.int32)
    ids[0, : len(row)] = row
    return jnp.asarray(ids), jnp.asarray((np.arange(length) < len(row))[None].astype(np.float32))


def _layer(
    config: ModelConfig, compute: Compute, params: tree.Tree, x: jax.Array, real: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """One layer over x [1, T, D]: (its output, sums over real tokens)."""
    places = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    segments = real.astype(jnp.int32)
    mask = causal_mask(
        places,
        places,
        sliding_window=config.sliding_window,
        query_segments=segments,
        key_segments=segments,
    )
    cos, sin = rope.angles(config, jnp.where(segments > 0, places, 0))
    context = transformer.Context(cos, sin, mask, real, segments, None)

    def squares(inputs: jax.Array) -> jax.Array:
        return jnp.einsum("...ti,...t->i", jnp.square(inputs.astype(jnp.float32)), real)

    normed = transformer.RMSNorm(config, params["input_layernorm"])(x)
    inner = config.num_attention_heads * config.head_dim
    identity = {"weight": jnp.eye(inner, dtype=x.dtype)}
    bare = {**params["self_attn"], "o_proj": identity}
    mixed, _ = transformer.Attention(config, compute, bare)(normed, context, None)
    between = x + transformer.Linear(compute, params["self_attn"]["o_proj"])(mixed)
    second = transformer.RMSNorm(config, params["post_attention_layernorm"])(between)
    found = {
        **{f"layers.self_attn.{n}_proj.weight": squares(normed) for n in "qkv"},
        "layers.self_attn.o_proj.weight": squares(mixed),
    }
    if config.moe is None:
        gate, up = (
            transformer.Linear(compute, params["mlp"][f"{name}_proj"])(second)
            for name in ("gate", "up")
        )
        hidden = jax.nn.silu(gate) * up
        out = between + transformer.Linear(compute, params["mlp"]["down_proj"])(hidden)
        for name, inputs in (("gate", second), ("up", second), ("down", hidden)):
            found[f"layers.mlp.{name}_proj.weight"] = squares(inputs)
    else:
        block = params["block_sparse_moe"]
        mixed, _ = transformer.SparseMoe(config, compute, block)(second, real)
        out = between + mixed
        found |= _expert_squares(config, compute, block, second[0], real[0])
    return out, {"squares": found, "change": _change(x, out, real)}


def _change(before: jax.Array, after: jax.Array, real: jax.Array) -> jax.Array:
    a, b = before.astype(jnp.float32), after.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / jnp.maximum(norms, 1e-30)
    return ((1.0 - cosine) * real).sum()


def _expert_squares(
    config: ModelConfig, compute: Compute, block: tree.Tree, x: jax.Array, real: jax.Array
) -> dict[str, jax.Array]:
    """[E, in] of each expert's matrices, over the tokens that are sent to it; x [T, D]."""
    assert config.moe is not None
    logits = dot(x.astype(jnp.float32), block["gate"]["weight"], compute=compute)
    _, chosen, _ = moe.route(logits, config.moe.num_experts_per_tok)
    sent = jax.nn.one_hot(chosen, config.moe.num_local_experts).sum(axis=1) * real[:, None]

    def one(expert: Any) -> tuple[jax.Array, jax.Array]:
        gate, up, share = expert
        hidden = jax.nn.silu(dot(x, gate, compute=compute)) * dot(x, up, compute=compute)
        wide = jnp.square(hidden.astype(jnp.float32))
        return share @ jnp.square(x.astype(jnp.float32)), share @ wide

    weights = block["experts"]["w1"]["weight"], block["experts"]["w3"]["weight"]
    first, second = jax.lax.map(one, (*weights, sent.T))
    prefix = "layers.block_sparse_moe.experts"
    return {
        f"{prefix}.w1.weight": first,
        f"{prefix}.w3.weight": first,
        f"{prefix}.w2.weight": second,
    }
