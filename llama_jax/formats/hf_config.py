"""Hugging Face's `config.json` and `generation_config.json` to `ModelConfig` and back.

Reading is strict. A field is read, or known to leave the mathematics alone at the value it has, or
refused by name: a published variant whose mathematics differs from Llama's must not load as if it
were one. A field set to null counts as absent. Writing gives files that transformers 4 and 5 read
to the same values; fields that describe the source rather than the model are not carried over.
"""

import logging
from pathlib import Path
from typing import Any

from llama_jax.config import FLOAT_DTYPES, ModelConfig, MoeConfig
from llama_jax.formats.compressed_config import is_compressed, read_compressed
from llama_jax.formats.compressed_kind import METHOD
from llama_jax.formats.hf_rope import read_rope, rope_to_hf
from llama_jax.formats.json_fields import field_names, is_equal, read_json, shorten, to_number

logger = logging.getLogger(__name__)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_READ = {
    *_SIZES,
    "model_type",
    "architectures",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
}
# Fields that only some families have. On the others a value that switches them off is accepted.
_FAMILY_READ = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "mixtral": {
        "sliding_window",
        "num_local_experts",
        "num_experts_per_tok",
        "router_aux_loss_coef",
    },
}

# Accepted with exactly these values; any other value changes what the model computes. A `None`
# value never gets this far.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "router_jitter_noise": (0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "use_sliding_window": (False,),
}

# They act in training alone, and no training here drops anything: said aloud where not 0.
_DROPOUT = ("attention_dropout", "hidden_dropout")

# Bookkeeping, or defaults of generation that older transformers kept here: never read, any value.
_INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
    _name_or_path attn_implementation auto_map custom_pipelines experts_implementation
    finetuning_task gradient_checkpointing id2label is_decoder is_llama_config label2id language
    max_sequence_length model_max_length name_or_path num_labels output_attentions
    output_hidden_states output_router_logits prefix problem_type return_dict sep_token_id
    decoder_start_token_id task_specific_params tf_legacy_loss tokenizer_class torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length min_p no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)

# What transformers takes when the field is absent. Sizes have no default.
_RMS_NORM_EPS = {"llama": 1e-6, "mistral": 1e-6, "mixtral": 1e-5}
_MISTRAL_SLIDING_WINDOW = 4096
_KEY_VALUE_HEADS = {"llama": None, "mistral": 8, "mixtral": 8}


def read_config(folder: Path, *, stored_dtype: str | None = None) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face folder.

    End-of-text ids are the union of those in `config.json` and `generation_config.json`. The dtype
    is the declared one, or `stored_dtype`, or float32.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "params.json").is_file():
            raise ValueError(
                f"{folder} has no config.json; its params.json marks Meta's original layout, whose "
                f"weights are pickled. Convert it first, with transformers' "
                f"convert_llama_weights_to_hf, or download the Hugging Face version of the model"
            )
        raise ValueError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    raw = read_json(path)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    try:
        config = from_hf(raw, stored_dtype=stored_dtype)
        path = generation_path
        return _with_generation(config, generation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_hf(raw: dict[str, Any], *, stored_dtype: str | None = None) -> ModelConfig:
    """`ModelConfig` from the contents of config.json.

    Raises ValueError naming the field for anything missing, contradictory or unknown.
    """
    values = {name: value for name, value in raw.items() if value is not None}
    family = _family(values)
    _check_fields(values, family)
    missing = [name for name in _SIZES if name not in values]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}; sizes have no default")
    # Checked here too because head_dim divides by it.
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    for name, number in (("num_attention_heads", heads), ("hidden_size", hidden)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is {number!r}; it must be a positive integer")
    if "head_dim" not in values and hidden % heads:
        raise ValueError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} and head_dim "
            f"is not given"
        )
    theta, scaling = read_rope(values, family)
    return ModelConfig(
        model_type=family,
        num_key_value_heads=_key_value_heads(raw, family),
        head_dim=values.get("head_dim", hidden // heads),
        rms_norm_eps=to_number("rms_norm_eps", values.get("rms_norm_eps", _RMS_NORM_EPS[family])),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=values.get("attention_bias", False),
        mlp_bias=values.get("mlp_bias", False),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        sliding_window=_sliding_window(raw, family),
        moe=_moe(values) if family == "mixtral" else None,
        initializer_range=to_number("initializer_range", values.get("initializer_range", 0.02)),
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=_end_tokens(values),
        pad_token_id=values.get("pad_token_id"),
        dtype=declared_dtype(raw) or stored_dtype or "float32",
        **{name: values[name] for name in _SIZES},
    )


def declared_dtype(raw: dict[str, Any]) -> str | None:
    """The dtype config.json declares under either of its two names, or None."""
    names = {
        key: str(raw[key]).removeprefix("torch.")
        for key in ("dtype", "torch_dtype")
        if raw.get(key) is not None and raw[key] != "auto"
    }
    if len(set(names.values())) > 1:
        raise ValueError(
            f"dtype is {raw['dtype']!r} but torch_dtype is {raw['torch_dtype']!r}; they are two "
            f"names of one field, remove the wrong one"
        )
    for key, name in names.items():
        if name not in FLOAT_DTYPES:
            raise ValueError(f"{key} is {raw[key]!r}; allowed are {', '.join(FLOAT_DTYPES)}")
        return name
    return None


def _family(values: dict[str, Any]) -> str:
    architectures = values.get("architectures", [])
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ValueError(f"architectures is {architectures!r}; it must be a list of names")
    known = ", ".join(ARCHITECTURES.values())
    by_class = {name.lower(): family for family, name in ARCHITECTURES.items()}
    # The first conversions of Llama spelled it LLaMAForCausalLM.
    found = [by_class.get(name.lower()) for name in architectures]
    family = values.get("model_type") or next((f for f in found if f), None)
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ValueError(
            f"model_type {family!r} with architectures {architectures} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)} ({known})"
        )
    if architectures and family not in found:
        raise ValueError(
            f"architectures {architectures} with model_type {family!r} is not supported; "
            f"{ARCHITECTURES[family]} is"
        )
    return family


def _check_fields(values: dict[str, Any], family: str) -> None:
    read = _READ | _FAMILY_READ[family]
    problems = []
    for name, value in values.items():
        if name in read or name in _INERT or name in (*_DROPOUT, "layer_types"):
            continue
        if name == "quantization_config":
            _check_quantization(value)
            continue
        if name not in _FIXED:
            problems.append(f"{name} = {shorten(value)} is unknown")
        elif not any(is_equal(value, allowed) for allowed in _FIXED[name]):
            allowed = " or ".join(repr(item) for item in _FIXED[name])
            problems.append(f"{name} = {shorten(value)} is not supported, only {allowed}")
    if "layer_types" in values:
        windowed = family != "llama" and values.get("sliding_window") is not None
        expected = "sliding_attention" if windowed else "full_attention"
        kinds = values["layer_types"]
        layers = values.get("num_hidden_layers")
        if not isinstance(kinds, list) or any(kind != expected for kind in kinds):
            problems.append(f"layer_types = {shorten(kinds)} is not supported, only {expected!r}")
        elif len(kinds) != layers:
            problems.append(f"layer_types names {len(kinds)} layers, num_hidden_layers is {layers}")
    problems += _check_dropout(values)
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. Such a field can change what the model computes, so the model "
            f"is refused. If you know that one does not, remove it or set it to null"
        )


def _check_quantization(settings: Any) -> None:
    if is_compressed(settings):
        try:
            read_compressed(settings)
        except ValueError as error:
            raise ValueError(f"quantization_config: {error}") from error
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    how = "in an unnamed format" if method is None else f"by {method}"
    raise ValueError(
        f"quantization_config = {shorten(settings)}: the weights are quantized {how}, which is not "
        f"read, only {METHOD}; load the unquantized model and use `llama-jax quantize`"
    )


def _check_dropout(values: dict[str, Any]) -> list[str]:
    problems = []
    for name in _DROPOUT:
        rate = values.get(name, 0)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            problems.append(f"{name} is {shorten(rate)}; it must be a number from 0 to below 1")
        elif rate:
            logger.warning(
                "%s is %s in config.json, which acts only in training: nothing is dropped here, "
                "and an export says 0",
                name,
                rate,
            )
    return problems


def _key_value_heads(raw: dict[str, Any], family: str) -> Any:
    """Here null says something: as many as query heads, while an absent field is the family's."""
    given = raw.get("num_key_value_heads", _KEY_VALUE_HEADS[family])
    return raw["num_attention_heads"] if given is None else given


def _sliding_window(raw: dict[str, Any], family: str) -> int | None:
    """Here too: null is no window, while an absent field is Mistral's."""
    if family == "mistral":
        return raw.get("sliding_window", _MISTRAL_SLIDING_WINDOW)
    return raw.get("sliding_window") if family == "mixtral" else None


def _moe(values: dict[str, Any]) -> MoeConfig:
    for name in ("num_local_experts", "num_experts_per_tok"):
        if name not in values:
            raise ValueError(f"missing {name}; sizes have no default")
    return MoeConfig(
        num_local_experts=values["num_local_experts"],
        num_experts_per_tok=values["num_experts_per_tok"],
        router_aux_loss_coef=to_number(
            "router_aux_loss_coef", values.get("router_aux_loss_coef", 0.001)
        ),
    )


def _with_generation(config: ModelConfig, generation: dict[str, Any]) -> ModelConfig:
    """generation_config.json speaks where config.json does not, and may name further ends."""
    spoken: dict[str, Any] = {
        name: generation.get(name)
        for name in ("bos_token_id", "pad_token_id")
        if getattr(config, name) is None
    }
    ends = dict.fromkeys((*config.eos_token_id, *_end_tokens(generation)))
    return config.replace(eos_token_id=tuple(ends), **spoken)


def _end_tokens(source: dict[str, Any]) -> tuple[int, ...]:
    ids = source.get("eos_token_id")
    tokens = ids if isinstance(ids, list) else [] if ids is None else [ids]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"eos_token_id is {shorten(ids)}; it must be an id or a list of ids")
    return tuple(dict.fromkeys(tokens))


def to_hf(config: ModelConfig, *, declare_dtype: bool = True) -> dict[str, Any]:
    """The contents of config.json. Rotary and dtype fields are written under both the names of
    transformers 4 and 5. `declare_dtype` False leaves the dtype to the weight files."""
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in _SIZES},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        **_tokens_to_hf(config),
        **rope_to_hf(config),
    }
    if declare_dtype:
        fields |= {"dtype": config.dtype, "torch_dtype": config.dtype}
    own: dict[str, Any] = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        "num_local_experts": None,
        "num_experts_per_tok": None,
        "router_aux_loss_coef": None,
    }
    if config.moe is not None:
        own |= {name: getattr(config.moe, name) for name in field_names(MoeConfig)}
    for name, value in own.items():
        if name in _FAMILY_READ[config.model_type]:
            fields[name] = value
        elif value not in (False, None):
            raise ValueError(
                f"Hugging Face's {config.model_type} has no {name}, which is {value!r}; set "
                f"model_type to a family that has it, or the field to its neutral value"
            )
    if config.model_type == "mixtral":
        if config.moe is None:
            raise ValueError("Hugging Face's mixtral needs experts, but moe is None")
        fields |= {"output_router_logits": False, "router_jitter_noise": 0.0}
    return dict(sorted(fields.items()))


def generation_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of generation_config.json: the token ids that begin, end and pad."""
    tokens = _tokens_to_hf(config)
    return {name: value for name, value in tokens.items() if value is not None}


def _tokens_to_hf(config: ModelConfig) -> dict[str, Any]:
    ends = list(config.eos_token_id)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config.pad_token_id,
    }
