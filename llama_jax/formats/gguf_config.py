"""The metadata of a GGUF file to `ModelConfig` and back.

Reading is strict: every `llama.*` key is read, or required to have the value at which it changes
nothing, or refused by name. Keys outside `llama.` and `tokenizer.` describe the file's origin.

GGUF has no place for some of a config (which Hugging Face family it was, the initializer's range,
a third end token) and keeps numbers in single precision. What is lost that way is written under a
key of our own, `llama_jax.config`, as a JSON object of exactly the fields that would come back
different; without it the file is a plain GGUF file like any other.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType, TokenType

from llama_jax.config import ROPE_THETAS, ModelConfig, MoeConfig
from llama_jax.formats.gguf_fields import (
    Entry,
    Fields,
    float32_entry,
    uint32_entry,
)
from llama_jax.formats.gguf_rope import FACTORS_TENSOR, read_scaling, scaling_entries
from llama_jax.model.rope import attention_factor, inverse_frequencies

ARCHITECTURE = "llama"
CONFIG_KEY = "llama_jax.config"

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"

# What transformers gives Mixtral; a GGUF file does not say.
_ROUTER_AUX_LOSS_COEF = 0.001

# An id that stands for "no such token".
_NO_TOKEN = 2**32 - 1
# Every token that ends a generation: end of sequence, of turn, of message.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

# Keys that llama.cpp knows for this or a related architecture, at the value that changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # unset, softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "router_logit_softcapping": (0,),
    "swin_norm": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}

Shapes = Mapping[str, tuple[int, ...]]


def read_config(
    metadata: Mapping[str, Any],
    shapes: Shapes,
    *,
    dtype: str,
    read_factors: Callable[[], np.ndarray],
) -> ModelConfig:
    """`ModelConfig` from a file's metadata and the shapes of its tensors.

    `dtype` is that of the stored weights; `read_factors` is called for the divisors of
    `rope_freqs.weight` where the file has them. Raises ValueError naming every key at fault.
    """
    _check_kind(metadata)
    fields = Fields(metadata)
    for name, allowed in _NEUTRAL.items():
        fields.require(name, allowed)
    layers = fields.integer("block_count")
    hidden = fields.integer("embedding_length")
    ffn = fields.integer("feed_forward_length")
    heads = fields.integer("attention.head_count")
    kv_heads = fields.integer("attention.head_count_kv", heads)
    context = fields.integer("context_length")
    eps = fields.number("attention.layer_norm_rms_epsilon")
    theta = fields.number("rope.freq_base", 10000.0)  # llama.cpp's default
    window = fields.integer("attention.sliding_window", 0) or None
    head_dim = _head_dim(fields, hidden, heads)
    moe = _read_moe(fields, ffn)
    vocab = _vocab_size(fields, shapes)
    _check_layers(fields, layers, shapes)
    # Rotary frequencies need sane numbers; `fields` and the config name the others.
    is_sane = head_dim and ROPE_THETAS[0] <= theta <= ROPE_THETAS[1]
    factors = read_factors() if FACTORS_TENSOR in shapes and is_sane else None
    scaling = read_scaling(fields, theta=theta, head_dim=head_dim, factors=factors)
    fields.finish()
    config = ModelConfig(
        model_type="mixtral" if moe else "mistral" if window else "llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=_has(shapes, ".attn_q.bias"),
        mlp_bias=_has(shapes, ".ffn_gate.bias"),
        tie_word_embeddings=_HEAD not in shapes,
        sliding_window=window,
        moe=moe,
        bos_token_id=_token(metadata, "bos_token_id"),
        eos_token_id=_end_tokens(metadata),
        pad_token_id=_token(metadata, "padding_token_id"),
        dtype=dtype,
    )
    return _with_own_fields(config, metadata.get(CONFIG_KEY))


def _check_kind(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if not _is_one_of(architecture, ARCHITECTURE):
        raise ValueError(f"general.architecture is {architecture!r}; only 'llama' is supported")
    if not _is_one_of(metadata.get("general.type", "model"), "model"):
        raise ValueError(
            f"general.type is {metadata['general.type']!r}; only a whole model can be loaded"
        )
    if not _is_one_of(metadata.get("split.count", 1), 0, 1):
        raise ValueError(
            f"split.count is {metadata['split.count']!r}: this is one file of several; join them "
            f"with llama.cpp's `llama-gguf-split --merge`"
        )


def _is_one_of(value: Any, *allowed: Any) -> bool:
    """False for an array, which NumPy would compare item by item."""
    return not isinstance(value, np.ndarray) and value in allowed


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if heads == 0 or (hidden % heads and not fields.has("attention.key_length")):
        fields.problem("attention.head_count", f"is {heads}, which does not divide {hidden}")
        return 0
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if head_dim < 2 or head_dim % 2:
        fields.problem("attention.key_length", f"is {head_dim}; heads need an even size")
    for name in ("attention.value_length", "rope.dimension_count"):
        size = fields.integer(name, head_dim)
        if size != head_dim:
            fields.problem(name, f"is {size}, but heads have {head_dim} dimensions")
    scale = fields.number("attention.scale", 0.0)
    if scale and head_dim and np.float32(scale) != np.float32(head_dim**-0.5):
        fields.problem("attention.scale", f"is {scale}; only 1 / sqrt(head size) is supported")
    return head_dim


def _read_moe(fields: Fields, ffn: int) -> MoeConfig | None:
    experts = fields.integer("expert_count", 0)
    used = fields.integer("expert_used_count", None if experts else 0)
    expert_ffn = fields.integer("expert_feed_forward_length", ffn)
    if experts and expert_ffn not in (0, ffn):
        fields.problem("expert_feed_forward_length", f"is {expert_ffn}; it must be {ffn}")
    if not experts:
        return None
    return MoeConfig(experts, used, _ROUTER_AUX_LOSS_COEF)


def _vocab_size(fields: Fields, shapes: Shapes) -> int:
    """The number of embedding rows: the key is optional and must agree."""
    if len(shapes.get(_EMBEDDING, ())) != 2:
        raise ValueError(f"tensor {_EMBEDDING!r} is missing or not a matrix")
    rows = shapes[_EMBEDDING][0]
    stated = fields.integer("vocab_size", rows)
    if stated != rows:
        fields.problem("vocab_size", f"is {stated}, but {_EMBEDDING} has {rows} rows")
    return rows


def _check_layers(fields: Fields, layers: int, shapes: Shapes) -> None:
    """Compared here so that an absurd count never becomes a list of expected tensors."""
    present = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    if layers != len(present):
        fields.problem(
            "block_count", f"is {layers}, but there are tensors of {len(present)} blocks"
        )


def _has(shapes: Shapes, suffix: str) -> bool:
    return any(name.endswith(suffix) for name in shapes)


def _token(metadata: Mapping[str, Any], name: str) -> int | None:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{key} is {value!r}; it must be a token id")
    return None if value == _NO_TOKEN else value


def _end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    ids = (_token(metadata, name) for name in _END_KEYS)
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def tokenizer_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `tokenizer.*` entries, without ids that stand for no token and without the entries that
    only fill the tables up to the number of embedding rows."""
    fields = {
        key: value
        for key, value in metadata.items()
        if key.startswith("tokenizer.")
        and not (key.endswith("_token_id") and isinstance(value, int) and value == _NO_TOKEN)
    }
    tokens, types = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(types, np.ndarray) and len(tokens) == len(types):
        used = np.flatnonzero(types != TokenType.UNUSED)
        count = int(used[-1]) + 1 if used.size else 0
        for name in ("token_type", "scores"):
            key = f"tokenizer.ggml.{name}"
            value = fields.get(key)
            if isinstance(value, np.ndarray) and len(value) == len(tokens):
                fields[key] = value[:count]
        fields["tokenizer.ggml.tokens"] = tokens[:count]
    return fields


def config_entries(config: ModelConfig) -> list[Entry]:
    """The `llama.*` metadata and the token ids that the config names."""
    entries = [
        uint32_entry("vocab_size", config.vocab_size),
        uint32_entry("context_length", config.max_position_embeddings),
        uint32_entry("embedding_length", config.hidden_size),
        uint32_entry("block_count", config.num_hidden_layers),
        uint32_entry("feed_forward_length", config.intermediate_size),
        uint32_entry("attention.head_count", config.num_attention_heads),
        uint32_entry("attention.head_count_kv", config.num_key_value_heads),
        uint32_entry("attention.key_length", config.head_dim),
        uint32_entry("attention.value_length", config.head_dim),
        float32_entry("attention.layer_norm_rms_epsilon", config.rms_norm_eps),
        uint32_entry("rope.dimension_count", config.head_dim),
        float32_entry("rope.freq_base", config.rope_theta),
        *scaling_entries(config),
    ]
    if config.sliding_window is not None:
        entries.append(uint32_entry("attention.sliding_window", config.sliding_window))
    if config.moe is not None:
        entries.append(uint32_entry("expert_count", config.moe.num_local_experts))
        entries.append(uint32_entry("expert_used_count", config.moe.num_experts_per_tok))
    return entries


def token_entries(config: ModelConfig) -> list[Entry]:
    """The ids the config names, under the keys that `read_config` takes them from."""
    ids: dict[str, int | None] = {
        "bos_token_id": config.bos_token_id,
        "padding_token_id": config.pad_token_id,
        **dict(zip(_END_KEYS, config.eos_token_id, strict=False)),
    }
    return [
        Entry(f"tokenizer.ggml.{name}", GGUFValueType.UINT32, index)
        for name, index in ids.items()
        if index is not None and index >= 0
    ]


# Fields GGUF does not hold, and those it holds rounded or in another form.
_OWN = (
    "model_type",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "moe",
)
_ROUNDED = ("rms_norm_eps", "rope_theta")


def own_entry(config: ModelConfig, read_back: ModelConfig) -> Entry | None:
    """What `read_back`, the config as the other entries give it, has different."""
    wanted, got = config.to_dict(), read_back.to_dict()
    different = {name: value for name, value in wanted.items() if value != got[name]}
    if not different:
        return None
    text = json.dumps(different, sort_keys=True)
    _with_own_fields(read_back, text)  # what could not be read is not written
    return Entry(CONFIG_KEY, GGUFValueType.STRING, text)


def _with_own_fields(config: ModelConfig, text: Any) -> ModelConfig:
    """`config` with the fields of `llama_jax.config`, which may not contradict the other keys."""
    if text is None:
        return config
    try:
        different = json.loads(text)
        values = {**config.to_dict(), **different}
        full = ModelConfig.from_dict(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_KEY} is not a JSON object of config fields: {error}") from error
    for name in different:
        if not _agree(name, full, config):
            raise ValueError(
                f"{CONFIG_KEY} gives {name} = {different[name]!r}, but the file's other metadata "
                f"gives {getattr(config, name)!r}; remove {CONFIG_KEY}, or the field from it"
            )
    return full


def _agree(name: str, full: ModelConfig, config: ModelConfig) -> bool:
    a, b = getattr(full, name), getattr(config, name)
    if name == "moe" and a is not None and b is not None:
        return dataclasses.replace(a, router_aux_loss_coef=b.router_aux_loss_coef) == b
    if name == "rope_scaling":
        return _same_rotation(full, config)
    if name in _ROUNDED:
        return bool(np.float32(a) == np.float32(b))
    return a == b or (name in _OWN and name != "moe")


def _same_rotation(full: ModelConfig, config: ModelConfig) -> bool:
    kinds = [c.rope_scaling.rope_type if c.rope_scaling else None for c in (full, config)]
    # A factor of 1 is no scaling, as the file says; dynamic scaling comes with the length.
    if kinds[0] != kinds[1] and "dynamic" in kinds:
        return False
    return attention_factor(full) == attention_factor(config) and np.allclose(
        inverse_frequencies(full), inverse_frequencies(config), rtol=1e-5, atol=0
    )
