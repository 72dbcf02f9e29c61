"""Every weight of a model, described once.

A row says where the weight lives in the parameter tree, its shape, the logical axis of each
dimension, its role, and its Hugging Face name. Sharding, import and export, adapters, weight
decay, quantization and pruning read this table; nothing else knows what weights a Llama has.

Matrices keep HF's layout, [out, in] behind the stacking dimensions, so that files are copied and
never transposed.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import ModelConfig

Role = Literal["matrix", "router", "embedding", "head", "norm", "bias"]


@dataclass(frozen=True)
class Weight:
    """One row: `path` in the tree, full `shape`, logical `axes` of the same length.

    `contracted` is the dimension that `dot` sums over, counted from the end, None for weights that
    are not multiplied. `hf_name` holds `{layer}` and `{expert}` where the tree stacks.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: Role
    hf_name: str

    @property
    def contracted(self) -> int | None:
        return -1 if self.role in ("matrix", "router", "head") else None

    def hf_names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(HF tensor name, index into the stacked array) for each tensor the files hold."""
        fields = [name for name in ("layer", "expert") if f"{{{name}}}" in self.hf_name]
        for index in itertools.product(*(range(self.shape[i]) for i in range(len(fields)))):
            yield self.hf_name.format(**dict(zip(fields, index, strict=True))), index


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """How many units of each logical axis there are to distribute; heads count as heads."""
    return {
        "embed": config.hidden_size,
        "expert_embed": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
        "layers": config.num_hidden_layers,
        "experts": config.moe.num_local_experts if config.moe else 1,
    }


def weight_table(config: ModelConfig) -> dict[str, Weight]:
    """Path -> row, in the order of the forward pass."""
    rows = [
        Weight(
            "embed_tokens.weight",
            (config.vocab_size, config.hidden_size),
            ("vocab", "embed"),
            "embedding",
            "model.embed_tokens.weight",
        ),
        *_layer_rows(config),
        Weight("norm.weight", (config.hidden_size,), (None,), "norm", "model.norm.weight"),
    ]
    if not config.tie_word_embeddings:
        rows.append(
            Weight(
                "lm_head.weight",
                (config.vocab_size, config.hidden_size),
                ("vocab", "embed"),
                "head",
                "lm_head.weight",
            )
        )
    return {row.path: row for row in rows}


def _layer_rows(config: ModelConfig) -> Iterator[Weight]:
    d, f = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim

    yield _norm(config, "input_layernorm")
    for name, out, inner, out_axis, in_axis in (
        ("q_proj", q, d, "heads", "embed"),
        ("k_proj", kv, d, "kv_heads", "embed"),
        ("v_proj", kv, d, "kv_heads", "embed"),
        ("o_proj", d, q, "embed", "heads"),
    ):
        yield from _linear(
            config, f"self_attn.{name}", (out, inner), (out_axis, in_axis), config.attention_bias
        )
    yield _norm(config, "post_attention_layernorm")
    if config.moe is None:
        for name, out, inner, out_axis, in_axis in (
            ("gate_proj", f, d, "mlp", "embed"),
            ("up_proj", f, d, "mlp", "embed"),
            ("down_proj", d, f, "embed", "mlp"),
        ):
            yield from _linear(
                config, f"mlp.{name}", (out, inner), (out_axis, in_axis), config.mlp_bias
            )
    else:
        yield from _expert_rows(config)


def _norm(config: ModelConfig, name: str) -> Weight:
    return Weight(
        f"layers.{name}.weight",
        (config.num_hidden_layers, config.hidden_size),
        ("layers", None),
        "norm",
        f"model.layers.{{layer}}.{name}.weight",
    )


def _linear(
    config: ModelConfig,
    name: str,
    shape: tuple[int, int],
    axes: tuple[str, str],
    bias: bool,
) -> Iterator[Weight]:
    layers = config.num_hidden_layers
    hf_name = f"model.layers.{{layer}}.{name}"
    yield Weight(
        f"layers.{name}.weight", (layers, *shape), ("layers", *axes), "matrix", f"{hf_name}.weight"
    )
    if bias:
        yield Weight(
            f"layers.{name}.bias",
            (layers, shape[0]),
            ("layers", axes[0]),
            "bias",
            f"{hf_name}.bias",
        )


def _expert_rows(config: ModelConfig) -> Iterator[Weight]:
    assert config.moe is not None
    layers, experts = config.num_hidden_layers, config.moe.num_local_experts
    d, f = config.hidden_size, config.intermediate_size
    block = "block_sparse_moe"
    yield Weight(
        f"layers.{block}.gate.weight",
        (layers, experts, d),
        ("layers", None, "embed"),
        "router",
        f"model.layers.{{layer}}.{block}.gate.weight",
    )
    for name, shape, axes in (
        ("w1", (f, d), ("mlp", "expert_embed")),
        ("w2", (d, f), ("expert_embed", "mlp")),
        ("w3", (f, d), ("mlp", "expert_embed")),
    ):
        yield Weight(
            f"layers.{block}.experts.{name}.weight",
            (layers, experts, *shape),
            ("layers", "experts", *axes),
            "matrix",
            f"model.layers.{{layer}}.{block}.experts.{{expert}}.{name}.weight",
        )


def num_parameters(config: ModelConfig) -> int:
    total = 0
    for row in weight_table(config).values():
        size = 1
        for length in row.shape:
            size *= length
        total += size
    return total


def abstract_params(config: ModelConfig, *, dtype: str | None = None) -> tree.Tree:
    """The parameter tree as `jax.ShapeDtypeStruct`s; `dtype` None means `config.dtype`."""
    return tree.unflatten(
        {
            row.path: jax.ShapeDtypeStruct(row.shape, jnp.dtype(dtype or config.dtype))
            for row in weight_table(config).values()
        }
    )


def init_params(config: ModelConfig, rng: jax.Array, *, dtype: str | None = None) -> tree.Tree:
    """Fresh parameters as transformers draws them: normal(0, initializer_range), norms one,
    biases zero. Weight number i of the table draws from key i folded into `rng`."""
    target = jnp.dtype(dtype or config.dtype)
    leaves = {}
    for number, row in enumerate(weight_table(config).values()):
        if row.role == "norm":
            leaves[row.path] = jnp.ones(row.shape, target)
        elif row.role == "bias":
            leaves[row.path] = jnp.zeros(row.shape, target)
        else:
            draw = jax.random.normal(jax.random.fold_in(rng, number), row.shape, jnp.float32)
            leaves[row.path] = (draw * config.initializer_range).astype(target)
    return tree.unflatten(leaves)
