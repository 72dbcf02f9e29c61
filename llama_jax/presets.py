"""The published shapes of the family, by name: `presets["llama3.1-8b"]` is a `ModelConfig`.

Each row states what its model's own config.json states; sources are the model cards' repositories
named in the comments. Base models share their shapes with the instruction-tuned ones.
"""

from typing import Any

from llama_jax.config import ModelConfig, MoeConfig, RopeScaling


def _llama2_like(hidden: int, mlp: int, layers: int, heads: int, kv: int, **rest: Any) -> Any:
    defaults: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 32000,
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": (2,),
        "dtype": "float16",
    }
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        **{**defaults, **rest},
    )


def _llama1(hidden: int, mlp: int, layers: int, heads: int) -> ModelConfig:
    return _llama2_like(
        hidden, mlp, layers, heads, heads, rms_norm_eps=1e-6, max_position_embeddings=2048
    )


def _code_llama(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int) -> ModelConfig:
    return _llama2_like(
        hidden,
        mlp,
        layers,
        heads,
        kv,
        vocab_size=vocab,
        rope_theta=1e6,
        max_position_embeddings=16384,
        dtype="bfloat16",
    )


def _llama3(
    hidden: int, mlp: int, layers: int, heads: int, *, factor: float | None = None, **rest: Any
) -> ModelConfig:
    scaling = None
    if factor is not None:
        scaling = RopeScaling(
            rope_type="llama3",
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    return _llama2_like(
        hidden,
        mlp,
        layers,
        heads,
        8,
        vocab_size=128256,
        rope_theta=500000.0,
        rope_scaling=scaling,
        max_position_embeddings=8192 if factor is None else 131072,
        bos_token_id=128000,
        eos_token_id=(128001,),
        dtype="bfloat16",
        **rest,
    )


def _smollm2(hidden: int, mlp: int, layers: int, heads: int, kv: int, theta: float) -> ModelConfig:
    return _llama2_like(
        hidden,
        mlp,
        layers,
        heads,
        kv,
        vocab_size=49152,
        rope_theta=theta,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=(0,),
        dtype="bfloat16",
    )


def _mistral(hidden: int, layers: int, **rest: Any) -> ModelConfig:
    return _llama2_like(
        hidden,
        14336,
        layers,
        32,
        8,
        **{
            "model_type": "mistral",
            "max_position_embeddings": 32768,
            "dtype": "bfloat16",
            **rest,
        },
    )


def _mixtral(hidden: int, mlp: int, layers: int, heads: int, **rest: Any) -> ModelConfig:
    return _llama2_like(
        hidden,
        mlp,
        layers,
        heads,
        8,
        model_type="mixtral",
        rope_theta=1e6,
        dtype="bfloat16",
        **rest,
    )


presets: dict[str, ModelConfig] = {
    # huggyllama/llama-*
    "llama-7b": _llama1(4096, 11008, 32, 32),
    "llama-13b": _llama1(5120, 13824, 40, 40),
    "llama-30b": _llama1(6656, 17920, 60, 52),
    "llama-65b": _llama1(8192, 22016, 80, 64),
    # meta-llama/Llama-2-*
    "llama2-7b": _llama2_like(4096, 11008, 32, 32, 32),
    "llama2-13b": _llama2_like(5120, 13824, 40, 40, 40),
    "llama2-70b": _llama2_like(8192, 28672, 80, 64, 8),
    # codellama/CodeLlama-*
    "codellama-7b": _code_llama(4096, 11008, 32, 32, 32, 32016),
    "codellama-13b": _code_llama(5120, 13824, 40, 40, 40, 32016),
    "codellama-34b": _code_llama(8192, 22016, 48, 64, 8, 32000),
    # meta-llama/Meta-Llama-3-*
    "llama3-8b": _llama3(4096, 14336, 32, 32),
    "llama3-70b": _llama3(8192, 28672, 80, 64),
    # meta-llama/Llama-3.1-*, 3.2-*, 3.3-*
    "llama3.1-8b": _llama3(4096, 14336, 32, 32, factor=8.0),
    "llama3.1-70b": _llama3(8192, 28672, 80, 64, factor=8.0),
    "llama3.1-405b": _llama3(16384, 53248, 126, 128, factor=8.0),
    "llama3.2-1b": _llama3(2048, 8192, 16, 32, factor=32.0, tie_word_embeddings=True),
    "llama3.2-3b": _llama3(3072, 8192, 28, 24, factor=32.0, tie_word_embeddings=True),
    "llama3.3-70b": _llama3(8192, 28672, 80, 64, factor=8.0),
    # TinyLlama/TinyLlama-1.1B-*
    "tinyllama-1.1b": _llama2_like(2048, 5632, 22, 32, 4, max_position_embeddings=2048),
    # HuggingFaceTB/SmolLM2-*
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 100000.0),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 100000.0),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 130000.0),
    # mistralai/Mistral-7B-v*, Mistral-Nemo-Base-2407
    "mistral-7b-v0.1": _mistral(4096, 32, sliding_window=4096),
    "mistral-7b-v0.2": _mistral(4096, 32, rope_theta=1e6),
    "mistral-7b-v0.3": _mistral(4096, 32, rope_theta=1e6, vocab_size=32768),
    "mistral-nemo-12b": _mistral(
        5120,
        40,
        rope_theta=1e6,
        vocab_size=131072,
        head_dim=128,
        max_position_embeddings=131072,
    ),
    # mistralai/Mixtral-8x7B-v0.1, Mixtral-8x22B-v0.1
    "mixtral-8x7b": _mixtral(
        4096,
        14336,
        32,
        32,
        max_position_embeddings=32768,
        moe=MoeConfig(num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.02),
    ),
    "mixtral-8x22b": _mixtral(
        6144,
        16384,
        56,
        48,
        max_position_embeddings=65536,
        moe=MoeConfig(num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.001),
    ),
}


def preset(name: str, *, field: str) -> ModelConfig:
    """The shapes of one preset; ValueError, naming the `field` that has it, for another name."""
    if name not in presets:
        raise ValueError(f"{field} is {name!r}; it must be one of {', '.join(presets)}")
    return presets[name]
