"""A model run layer by layer over unlabelled rows, and looked at: what goes into each weight.

The input of o_proj is read by giving the attention an identity in its place, which multiplies by
one.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.model import moe, rope, transformer
from llama_jax.model.attention import causal_mask
from llama_jax.model.context import Context
from llama_jax.weights.dot import dot, embed

# (inputs [T, in], how much each counts [T]: 0 for padding and for tokens not sent to an expert)
# -> what is wanted of them, arrays.
Take = Callable[[jax.Array, jax.Array], Any]


def layers_of(config: ModelConfig, params: tree.Tree) -> Iterator[tree.Tree]:
    """The layers of a stacked tree, one after the other."""
    for i in range(config.num_hidden_layers):
        yield jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])


def first_inputs(
    params: tree.Tree, rows: Iterable[np.ndarray], *, compute: Compute
) -> list[tuple[jax.Array, jax.Array]]:
    """(what goes into the first layer [1, T, D], which tokens are real [1, T]) of each row of token
    ids.

    Raises ValueError when there is no token at all.
    """
    found = []
    for row in rows:
        if len(row):
            ids, real = padded(row)
            found.append((embed(params["embed_tokens"]["weight"], ids, compute=compute), real))
    if not found:
        raise ValueError("there is nothing to calibrate with: no row has a token")
    return found


def padded(row: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """[1, T] ids and which are real; lengths are powers of two, so that few programs are made."""
    length = max(16, 1 << (len(row) - 1).bit_length())
    ids = np.zeros((1, length), np.int32)
    ids[0, : len(row)] = row
    return jnp.asarray(ids), jnp.asarray((np.arange(length) < len(row))[None].astype(np.float32))


def run_layer(
    config: ModelConfig,
    params: tree.Tree,
    x: jax.Array,
    real: jax.Array,
    *,
    compute: Compute,
    take: Take,
) -> tuple[jax.Array, dict[str, Any]]:
    """One layer over x [1, T, D]: (its output, path -> `take` of the inputs of that weight, of
    experts [E, ...])."""
    taken = functools.partial(_taken, take, real)
    normed = transformer.RMSNorm(config, params["input_layernorm"])(x)
    inner = config.num_attention_heads * config.head_dim
    identity = {"weight": jnp.eye(inner, dtype=x.dtype)}
    bare = {**params["self_attn"], "o_proj": identity}
    context = _context(config, x.shape[1], real)
    mixed, _ = transformer.Attention(config, compute, bare)(normed, context, None)
    between = x + transformer.Linear(compute, params["self_attn"]["o_proj"])(mixed)
    second = transformer.RMSNorm(config, params["post_attention_layernorm"])(between)
    found = {
        **dict.fromkeys((f"layers.self_attn.{n}_proj.weight" for n in "qkv"), taken(normed)),
        "layers.self_attn.o_proj.weight": taken(mixed),
    }
    if config.moe is None:
        gate, up = (
            transformer.Linear(compute, params["mlp"][f"{name}_proj"])(second)
            for name in ("gate", "up")
        )
        hidden = jax.nn.silu(gate) * up
        out = between + transformer.Linear(compute, params["mlp"]["down_proj"])(hidden)
        for name, inputs in (("gate", second), ("up", second), ("down", hidden)):
            found[f"layers.mlp.{name}_proj.weight"] = taken(inputs)
    else:
        block = params["block_sparse_moe"]
        mixed, _ = transformer.SparseMoe(config, compute, block)(second, real)
        out = between + mixed
        found["layers.block_sparse_moe.gate.weight"] = taken(second)
        found |= _of_experts(config, compute, block, second[0], real[0], take)
    return out, found


def _taken(take: Take, real: jax.Array, inputs: jax.Array) -> Any:
    return take(inputs[0], real[0])


def _context(config: ModelConfig, length: int, real: jax.Array) -> Context:
    places = jnp.arange(length, dtype=jnp.int32)[None]
    segments = real.astype(jnp.int32)
    mask = causal_mask(
        places,
        places,
        sliding_window=config.sliding_window,
        query_segments=segments,
        key_segments=segments,
    )
    cos, sin = rope.angles(config, jnp.where(segments > 0, places, 0))
    return Context(cos, sin, mask, real, segments, None)


def _of_experts(
    config: ModelConfig,
    compute: Compute,
    block: tree.Tree,
    x: jax.Array,
    real: jax.Array,
    take: Take,
) -> dict[str, Any]:
    """What goes into each expert's matrices, of the tokens that are sent to it; x [T, D]."""
    assert config.moe is not None
    logits = dot(x.astype(jnp.float32), block["gate"]["weight"], compute=compute)
    _, chosen, _ = moe.route(logits, config.moe.num_experts_per_tok)
    sent = jax.nn.one_hot(chosen, config.moe.num_local_experts).sum(axis=1) * real[:, None]

    def one(expert: Any) -> tuple[Any, Any]:
        gate, up, share = expert
        hidden = jax.nn.silu(dot(x, gate, compute=compute)) * dot(x, up, compute=compute)
        return take(x, share), take(hidden, share)

    weights = block["experts"]["w1"]["weight"], block["experts"]["w3"]["weight"]
    first, second = jax.lax.map(one, (*weights, sent.T))
    prefix = "layers.block_sparse_moe.experts"
    return {
        f"{prefix}.w1.weight": first,
        f"{prefix}.w3.weight": first,
        f"{prefix}.w2.weight": second,
    }


def head_inputs(
    config: ModelConfig, params: tree.Tree, x: jax.Array, real: jax.Array, *, take: Take
) -> tuple[str, Any]:
    """(path of the head's weight, `take` of what goes into it); x [1, T, D] left the last layer."""
    normed = transformer.RMSNorm(config, params["norm"])(x)
    name = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return name, take(normed[0], real[0])


def stacked(per_layer: Sequence[Any]) -> Any:
    """[L, ...] of what was found layer by layer, in the host's memory."""
    return jax.tree.map(lambda *each: np.stack([np.asarray(x) for x in each]), *per_layer)
