"""config.json and generation_config.json to ModelConfig and back."""

import dataclasses
import json

import numpy as np
import pytest
from transformers import AutoConfig, GenerationConfig

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.formats.hf_config import (
    declared_dtype,
    from_hf,
    generation_to_hf,
    read_config,
    to_hf,
)
from llama_jax.formats.json_fields import read_json
from llama_jax.model.rope import inverse_frequencies
from llama_jax.presets import presets
from tests.reference import reference_config
from tests.tiny import FAMILIES, tiny_config

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
MISTRAL = BASE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
MIXTRAL = BASE | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}

# What the published repositories hold, field for field, where they differ from each other.
_LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_LLAMA31 = _LLAMA2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_MISTRAL7B = {
    name: value
    for name, value in (
        _LLAMA2
        | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "torch_dtype": "bfloat16",
        }
    ).items()
    if name not in ("pretraining_tp", "rope_scaling")
}
_MIXTRAL8X7B = _MISTRAL7B | {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
PUBLISHED = {
    "llama-7b": {
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "max_sequence_length": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pad_token_id": -1,
        "rms_norm_eps": 1e-06,
        "torch_dtype": "float16",
        "transformers_version": "4.27.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama2-7b": _LLAMA2 | {"_name_or_path": "meta-llama/Llama-2-7b-hf"},
    "codellama-7b": _LLAMA2
    | {
        "max_position_embeddings": 16384,
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
        "vocab_size": 32016,
    },
    "llama3.1-8b": _LLAMA31,
    "llama3.2-1b": _LLAMA31
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "rope_scaling": _LLAMA31["rope_scaling"] | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": _LLAMA2
    | {
        "attention_bias": False,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    },
    "smollm2-135m": _LLAMA2
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "gradient_checkpointing": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "vocab_size": 49152,
    },
    "mistral-7b-v0.1": _MISTRAL7B,
    "mistral-7b-v0.2": _MISTRAL7B
    | {"rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0},
    "mistral-7b-v0.3": _MISTRAL7B
    | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "mistral-nemo-12b": _MISTRAL7B
    | {
        "head_dim": 128,
        "hidden_size": 5120,
        "max_position_embeddings": 131072,
        "num_hidden_layers": 40,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "mixtral-8x7b": _MIXTRAL8X7B,
    "mixtral-8x22b": _MIXTRAL8X7B
    | {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "max_position_embeddings": 65536,
        "num_attention_heads": 48,
        "num_hidden_layers": 56,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_load_and_equal_their_presets(name):
    got = dataclasses.asdict(from_hf(PUBLISHED[name]))
    preset = dataclasses.asdict(presets[name])
    # What fine-tunes and conversions of one model are free to differ in.
    for free in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "initializer_range"):
        got.pop(free), preset.pop(free)
    assert got == preset


OPTIONAL = [
    "head_dim",
    "num_key_value_heads",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "hidden_act",
    "pretraining_tp",
    "attention_dropout",
    "sliding_window",
    "quantization_config",
    "attn_logit_softcapping",
]


@pytest.mark.parametrize("name", OPTIONAL)
def test_R1_null_is_absent(name):
    absent = {key: value for key, value in BASE.items() if key != name}
    assert from_hf(absent | {name: None}) == from_hf(absent)
    assert from_hf(absent).head_dim == 16


def test_R2_key_value_heads_default_to_the_query_heads():
    raw = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    assert from_hf(raw).num_key_value_heads == 4
    for base in (BASE, MISTRAL, MIXTRAL):
        assert from_hf(base | {"num_key_value_heads": None}).num_key_value_heads == 4


@pytest.mark.parametrize("base", [BASE, MISTRAL, MIXTRAL])
def test_absent_fields_are_what_transformers_takes(base):
    optional = ("num_key_value_heads", "rms_norm_eps")
    raw = {key: value for key, value in base.items() if key not in optional}
    raw |= {"num_attention_heads": 16}
    ours, theirs = from_hf(raw), AutoConfig.for_model(**raw)
    assert ours.num_key_value_heads == (16 if base is BASE else 8)
    written = to_hf(ours)
    assert theirs.head_dim in (None, ours.head_dim)  # Mixtral's model derives it
    # No token is guessed, the dtype is the weights', and theta stands in rope_parameters too.
    apart = ("head_dim", "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "rope_theta")
    for name in written.keys() - {*apart, "rope_scaling"}:
        assert getattr(theirs, name) == written[name], name


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_R3_both_names_of_the_rope_type():
    one, two, three = (
        from_hf(BASE | {"rope_scaling": LLAMA3 | kind})
        for kind in (
            {"rope_type": "llama3"},
            {"type": "llama3"},
            {"rope_type": "llama3", "type": "llama3"},
        )
    )
    assert one == two == three
    assert one.rope_scaling == RopeScaling(rope_type="llama3", **LLAMA3)
    plain = inverse_frequencies(from_hf(BASE))
    assert not np.array_equal(inverse_frequencies(one), plain)
    np.testing.assert_array_equal(inverse_frequencies(one), inverse_frequencies(two))
    for bad, word in (
        ({"rope_type": "llama3", "type": "linear"}, "disagree"),
        ({}, "no rope_type"),
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": ["llama3"]}, "rope_type"),
    ):
        with pytest.raises(ValueError, match=word):
            from_hf(BASE | {"rope_scaling": LLAMA3 | bad})


def test_R4_rope_parameters():
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert from_hf(BASE | nested).rope_theta == 500000.0
    assert from_hf(BASE | nested | {"rope_theta": 500000}) == from_hf(BASE | nested)
    with pytest.raises(ValueError, match=r"rope_theta = 10000.*500000.*disagree"):
        from_hf(BASE | nested | {"rope_theta": 10000.0})
    scaled = {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}}
    both = scaled | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}}
    assert from_hf(BASE | both) == from_hf(BASE | scaled)
    assert from_hf(BASE | scaled).rope_scaling.factor == 8.0
    with pytest.raises(ValueError, match="disagree"):
        from_hf(BASE | both | {"rope_scaling": LLAMA3 | {"type": "llama3", "factor": 4.0}})
    with pytest.raises(ValueError, match="differs by layer"):
        from_hf(BASE | {"rope_parameters": {"full_attention": {"rope_type": "default"}}})
    with pytest.raises(ValueError, match="must be an object"):
        from_hf(BASE | {"rope_scaling": 2.0})


def test_R5_theta():
    assert from_hf(BASE).rope_theta == 10000.0
    integer, number = from_hf(BASE | {"rope_theta": 10**6}), from_hf(BASE | {"rope_theta": 1e6})
    assert integer == number and isinstance(integer.rope_theta, float)
    np.testing.assert_array_equal(inverse_frequencies(integer), inverse_frequencies(number))
    assert inverse_frequencies(integer)[1] == 1e6 ** -(2 / 16)
    for raw in (BASE, MISTRAL, MIXTRAL):  # absent: whatever the family's class takes
        default = type(reference_config(from_hf(raw)))().rope_parameters["rope_theta"]
        assert from_hf(raw).rope_theta == default


@pytest.mark.parametrize("value", [0, -1.0, "10000", True, float("nan"), [1], 10**400])
def test_theta_that_is_no_number(value):
    with pytest.raises(ValueError, match="rope_theta"):
        from_hf(BASE | {"rope_theta": value})


def _folder(tmp_path, config, generation=None):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (128001, [128001, 128008, 128009], (128001, 128008, 128009)),
        ([7, 8], 9, (7, 8, 9)),
        (7, None, (7,)),
        (None, [5], (5,)),
        (None, None, ()),
    ],
)
def test_R6_end_tokens_are_the_union(tmp_path, config, generation, expected):
    folder = _folder(tmp_path, BASE | {"eos_token_id": config}, {"eos_token_id": generation})
    read = read_config(folder)
    assert read.eos_token_id == expected
    assert read_config(_folder(tmp_path, to_hf(read), generation_to_hf(read))) == read


def test_tokens_of_generation_config_fill_in(tmp_path):
    folder = _folder(tmp_path, BASE, {"pad_token_id": 3, "bos_token_id": 1, "temperature": 0.6})
    read = read_config(folder)
    assert (read.pad_token_id, read.bos_token_id) == (3, 1)
    with pytest.raises(ValueError, match="eos_token_id"):
        from_hf(BASE | {"eos_token_id": ["</s>"]})


@pytest.mark.parametrize(
    "bad", [{"eos_token_id": [-1]}, {"bos_token_id": "1"}, {"pad_token_id": -2}]
)
def test_a_bad_token_is_told_of_the_file_that_names_it(tmp_path, bad):
    (field,) = bad
    with pytest.raises(ValueError, match=rf"generation_config\.json: .*{field} is"):
        read_config(_folder(tmp_path, BASE, bad))
    with pytest.raises(ValueError, match=rf"/config\.json: .*{field} is"):
        read_config(_folder(tmp_path, BASE | bad, {}))


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_R7_biases_belong_to_llama(flag):
    assert getattr(from_hf(BASE | {flag: True}), flag) is True
    for other in (MISTRAL, MIXTRAL):
        assert getattr(from_hf(other | {flag: False}), flag) is False
        with pytest.raises(ValueError, match=flag):
            from_hf(other | {flag: True})


def test_R8_dtype_has_two_names():
    assert from_hf(BASE | {"dtype": "bfloat16"}) == from_hf(BASE | {"torch_dtype": "bfloat16"})
    assert from_hf(BASE | {"dtype": "bfloat16"}).dtype == "bfloat16"
    assert from_hf(BASE | {"dtype": "float16", "torch_dtype": "float16"}).dtype == "float16"
    assert from_hf(BASE, stored_dtype="float16").dtype == "float16"
    assert declared_dtype(BASE) is None
    assert declared_dtype(BASE | {"torch_dtype": "torch.float16"}) == "float16"
    with pytest.raises(ValueError, match="two names of one field"):
        from_hf(BASE | {"dtype": "float32", "torch_dtype": "float16"})
    with pytest.raises(ValueError, match="int8"):
        from_hf(BASE | {"dtype": "int8"})


def test_R9_meta_layout_is_refused(tmp_path):
    (tmp_path / "params.json").write_text('{"dim": 4096}')
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no config.json.*params.json"):
        read_config(tmp_path)
    (tmp_path / "params.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", -1),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("hidden_size", 0),
        ("hidden_size", 10**12),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", 66),
        ("intermediate_size", 1e300),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("head_dim", -16),
        ("head_dim", 15),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", 10**400),
        ("initializer_range", -1),
        ("tie_word_embeddings", "false"),
        ("bos_token_id", "1"),
        ("pad_token_id", [1]),
    ],
)
def test_R10_sizes_are_refused_with_their_name(tmp_path, field, value):
    folder = _folder(tmp_path, BASE | {field: value})
    with pytest.raises(ValueError, match=field) as error:
        read_config(folder)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_sizes_have_no_default(field):
    for given in ({}, {field: None}):
        with pytest.raises(ValueError, match=f"missing {field}"):
            from_hf({key: value for key, value in BASE.items() if key != field} | given)


def test_experts_have_no_default():
    for field in ("num_local_experts", "num_experts_per_tok"):
        with pytest.raises(ValueError, match=f"missing {field}"):
            from_hf({key: value for key, value in MIXTRAL.items() if key != field})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("partial_rotary_factor", 0.5),
        ("attention_multiplier", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("use_sliding_window", True),
        ("pretraining_tp", 2),
        ("rope_interleaved", True),
        ("attention_dropout", 1.0),
        ("attention_dropout", "0.1"),
        ("router_jitter_noise", 0.1),
        ("sliding_window", 4096),
        ("num_local_experts", 8),
        ("qk_norm", True),
        ("a_field_of_tomorrow", 1),
    ],
)
def test_fields_that_change_the_mathematics_are_refused(field, value):
    with pytest.raises(ValueError, match=field) as error:
        from_hf(BASE | {field: value})
    assert str(value)[:5].strip("[{'\"").lower() in str(error.value).lower()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "by gptq, which is not read, only compressed-tensors",
        ),
        ({"quant_method": "awq", "bits": 4}, "by awq, which is not read"),
        ({"quant_method": "bitsandbytes"}, "by bitsandbytes.*; load the unquantized model and use"),
        ({"quant_method": "compressed-tensors"}, "quantization_config: config_groups is null"),
        ({"load_in_8bit": True}, "in an unnamed format, which is not read"),
    ],
)
def test_quantized_weights_are_refused_by_their_method(settings, words):
    with pytest.raises(ValueError, match=words):
        from_hf(BASE | {"quantization_config": settings})


def test_dropout_acts_in_training_alone_and_is_said_aloud(caplog):
    with caplog.at_level("WARNING"):
        assert from_hf(BASE | {"attention_dropout": 0.1}) == from_hf(BASE)
    assert "attention_dropout is 0.1" in caplog.text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (BASE | {"rope_theta": float("nan")}, "rope_theta is nan; it must be a finite number"),
        (MIXTRAL | {"router_aux_loss_coef": True}, "router_aux_loss_coef is True; it must be"),
        (BASE | {"layer_types": ["full_attention"] * 3}, "names 3 layers, num_hidden_layers is 2"),
    ],
)
def test_messages_say_what_is_wrong(raw, message):
    with pytest.raises(ValueError, match=message):
        from_hf(raw)


def test_all_unknown_fields_are_named_at_once():
    with pytest.raises(ValueError, match=r"one = 1.*two = 2.*set it to null"):
        from_hf(BASE | {"one": 1, "two": 2})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "swish"),
        ("partial_rotary_factor", 1.0),
        ("layer_types", ["full_attention", "full_attention"]),
        ("use_sliding_window", False),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}),
        ("output_router_logits", True),
        ("temperature", 0.6),
        ("id2label", {"0": "LABEL_0"}),
    ],
)
def test_harmless_fields_change_nothing(field, value):
    assert from_hf(BASE | {field: value}) == from_hf(BASE)


def test_sliding_window_null_means_none_and_absent_means_the_family_default():
    assert from_hf(MISTRAL).sliding_window == 4096  # transformers' MistralConfig
    assert from_hf(MISTRAL | {"sliding_window": None}).sliding_window is None
    windowed = MISTRAL | {"layer_types": ["sliding_attention"] * 2}
    assert from_hf(windowed | {"sliding_window": 8}).sliding_window == 8
    with pytest.raises(ValueError, match="layer_types"):
        from_hf(windowed | {"sliding_window": None})
    assert from_hf(MIXTRAL).sliding_window is None
    assert from_hf(MIXTRAL | {"sliding_window": 8}).sliding_window == 8


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"model_type": None, "architectures": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "list"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_other_architectures_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        from_hf(BASE | change)


def test_family_follows_from_the_architecture():
    assert from_hf(BASE | {"model_type": None}).model_type == "llama"
    assert from_hf(MIXTRAL | {"architectures": None}).model_type == "mixtral"


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "longrope", "long_factor": [1.0]}, 'rope_type "longrope" is not supp'),
        ({"type": "mrope", "mrope_section": [1]}, 'rope_type "mrope" is not supported; allowed'),
        ({"rope_type": "axial"}, 'rope_type "axial" is not supported'),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "finetuned": True}, "finetuned"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "linear", "factor": 10**400}, "factor"),
        ({"rope_type": "default", "factor": 2.0}, "default"),
        ({"rope_type": "llama3", "factor": 8.0}, "missing"),
        (
            {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9},
            "max_position_embeddings",
        ),
    ],
)
def test_rope_scalings_that_say_something_else(scaling, word):
    with pytest.raises(ValueError, match=word):
        from_hf(BASE | {"rope_scaling": scaling})


def test_rope_scalings_with_integers_and_neutral_fields():
    got = from_hf(BASE | {"rope_scaling": {"type": "linear", "factor": 4}}).rope_scaling
    assert got == RopeScaling("linear", 4.0) and isinstance(got.factor, float)
    neutral = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}
    assert from_hf(BASE | {"rope_scaling": neutral}).rope_scaling == RopeScaling("dynamic", 2.0)
    partial = {"type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}
    assert from_hf(BASE | {"rope_scaling": partial}).rope_scaling == RopeScaling("linear", 2.0)
    assert from_hf(BASE | {"rope_scaling": {"rope_type": "default"}}).rope_scaling is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"vocab_size": 1, "vocab_size": 2}', "\xff{}"])
def test_files_that_are_no_json_object(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_what_was_read(name):
    config = FAMILIES[name].replace(eos_token_id=(2, 5), pad_token_id=0)
    written = json.loads(json.dumps(to_hf(config)))
    assert from_hf(written) == config
    assert declared_dtype(written) == config.dtype
    assert declared_dtype(to_hf(config, declare_dtype=False)) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_same_values(tmp_path, name):
    config = FAMILIES[name].replace(eos_token_id=(2, 5), dtype="bfloat16", initializer_range=0.03)
    _folder(tmp_path, to_hf(config), generation_to_hf(config))
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    expected = reference_config(config).to_dict() | {
        "dtype": "bfloat16",
        "initializer_range": 0.03,
        "architectures": to_hf(config)["architectures"],
        "_name_or_path": str(tmp_path),
    }
    assert theirs == expected
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]


def test_the_fields_of_transformers_4_say_the_same():
    config = FAMILIES["llama3-rope"].replace(dtype="float16")
    written = to_hf(config)
    assert written["torch_dtype"] == written["dtype"] == "float16"
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"]["rope_type"] == "llama3"
    assert written["rope_parameters"] == {**written["rope_scaling"], "rope_theta": 500000.0}
    old = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
    new = {
        k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")
    }
    assert from_hf(old) == from_hf(new) == config


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(sliding_window=8),
        tiny_config(model_type="mistral", attention_bias=True),
        tiny_config(model_type="mixtral"),
        FAMILIES["mixtral"].replace(model_type="llama"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(config: ModelConfig):
    with pytest.raises(ValueError, match="Hugging Face's"):
        to_hf(config)
