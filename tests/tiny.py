"""Tiny models of every family and head layout: small enough to compile in seconds."""

import jax
import numpy as np

from llama_jax.config import ModelConfig, MoeConfig, RopeScaling
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantize import Quantization
from llama_jax.weights.table import init_params, weight_table

_BASE = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": (2,),
    "dtype": "float32",
}


def tiny_config(**changes) -> ModelConfig:
    return ModelConfig(**{**_BASE, **changes})


_LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

FAMILIES: dict[str, ModelConfig] = {
    "llama-mha": tiny_config(num_key_value_heads=4),
    "llama-gqa": tiny_config(),
    "llama-mqa": tiny_config(num_key_value_heads=1),
    "llama-tied": tiny_config(tie_word_embeddings=True),
    "llama-head-dim": tiny_config(head_dim=32),
    "llama-biases": tiny_config(attention_bias=True, mlp_bias=True),
    "llama3-rope": tiny_config(rope_theta=500000.0, rope_scaling=_LLAMA3),
    "linear-rope": tiny_config(rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
    "dynamic-rope": tiny_config(
        rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0), max_position_embeddings=16
    ),
    "yarn-rope": tiny_config(
        rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "mistral": tiny_config(model_type="mistral", sliding_window=8),
    "mistral-nemo": tiny_config(model_type="mistral", head_dim=32),
    "mixtral": tiny_config(
        model_type="mixtral",
        moe=MoeConfig(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02),
    ),
}


def tiny_params(config: ModelConfig, seed: int = 0):
    """Random parameters in which biases and norms are not trivial either."""
    from llama_jax import tree

    leaves = tree.flatten(init_params(config, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    for path, row in weight_table(config).items():
        if row.role in ("norm", "bias"):
            noise = rng.normal(0.0, 0.1, row.shape).astype(np.float32)
            leaves[path] = leaves[path] + noise.astype(leaves[path].dtype)
        else:
            leaves[path] = leaves[path] * np.asarray(4.0, leaves[path].dtype)
    return tree.unflatten(leaves)


def tiny_tokens(batch: int = 2, length: int = 12, seed: int = 0, vocab: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, (batch, length), dtype=np.int32)


def quantize_array(
    weight: jax.Array, *, scheme: str, tile: int | None = None, double: bool = False
) -> Leaf:
    """One weight [..., out, in] as `quantize` would store it."""
    return Quantization(scheme, tile, double=double).apply("the weight", weight)
