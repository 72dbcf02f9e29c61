"""Configurations refuse what cannot be, by field, and survive JSON."""

import json
import subprocess
import sys

import pytest

from llama_jax.config import DEFAULT_RULES, Compute, ModelConfig, MoeConfig, RopeScaling
from tests.tiny import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_json_round_trip(family):
    config = FAMILIES[family]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 1000000000),
        ("vocab_size", -1),
        ("num_attention_heads", 0),
        ("hidden_size", 0),
        ("intermediate_size", 2**62),
        ("head_dim", 15),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", True),
        ("hidden_size", 64.0),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", -1.0),
        ("rope_theta", "10000"),
        ("rope_theta", 1e-308),
        ("rope_theta", 1e300),
        ("sliding_window", 0),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", 2),
        ("eos_token_id", (-5,)),
        ("dtype", "int8"),
        ("model_type", "gpt2"),
    ],
)
def test_impossible_values_name_their_field(field, value):
    with pytest.raises(ValueError, match=field):
        tiny_config(**{field: value})


def test_unknown_fields_get_a_suggestion():
    values = tiny_config().to_dict() | {"num_hidden_layer": 2}
    with pytest.raises(ValueError, match="did you mean 'num_hidden_layers'"):
        ModelConfig.from_dict(values)


def test_end_tokens_may_be_one_id_or_none_as_in_hugging_face_files():
    for given, ends in ((2, (2,)), (None, ()), ([3, 2], (3, 2))):
        values = tiny_config().to_dict() | {"eos_token_id": given}
        assert ModelConfig.from_dict(values).eos_token_id == ends


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eos_token_id", "2", "config.eos_token_id is '2'"),
        ("eos_token_id", True, "config.eos_token_id is True"),
        ("rope_scaling", "linear", "config.rope_scaling is 'linear'; give a mapping"),
        ("rope_scaling", {"factor": 2.0}, "config.rope_scaling lacks rope_type"),
        ("rope_scaling", {"type": "linear"}, "config.rope_scaling has no field 'type'"),
        ("moe", 8, "config.moe is 8; give a mapping"),
        ("moe", {"num_local_experts": 8}, "config.moe lacks num_experts_per_tok, router_aux_loss"),
    ],
)
def test_fields_of_another_shape_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(tiny_config().to_dict() | {field: value})


def test_missing_fields_are_named():
    values = {k: v for k, v in tiny_config().to_dict().items() if k != "vocab_size"}
    with pytest.raises(ValueError, match="config lacks vocab_size"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({"rope_type": "dynamic", "factor": 1e300}, "factor is 1e\\+300"),
        ({"rope_type": "llama3", "factor": 1e-300}, "factor is 1e-300"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_slow": 1e-320}, "beta_slow"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e308}, "beta_fast"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1e300}, "attention_factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "does not read it"),
        ({"rope_type": "llama3", "factor": 8.0}, "is missing; rope_type llama3 needs it"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
            },
            "must be below",
        ),
    ],
)
def test_rope_scaling_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**values)


def test_rope_scalings_that_divide_by_zero():
    with pytest.raises(ValueError, match=r"rope_theta is 1.0; rope_type 'yarn'"):
        tiny_config(rope_theta=1.0, rope_scaling=RopeScaling("yarn", 4.0))
    with pytest.raises(ValueError, match="head_dim is 2; rope_type 'dynamic'"):
        tiny_config(head_dim=2, rope_scaling=RopeScaling("dynamic", 4.0))


def test_more_chosen_experts_than_there_are():
    with pytest.raises(ValueError, match="num_experts_per_tok is 5"):
        MoeConfig(num_local_experts=4, num_experts_per_tok=5, router_aux_loss_coef=0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float8"}, "compute.dtype"),
        ({"accumulation_dtype": "float16"}, "compute.accumulation_dtype"),
        ({"cache_dtype": "int4"}, "compute.cache_dtype"),
        ({"remat": "some"}, "compute.remat"),
        ({"attention": "flash"}, "compute.attention"),
        ({"moe": "sparse"}, "compute.moe"),
        ({"loss_chunk_tokens": 0}, "compute.loss_chunk_tokens"),
        ({"rules": (("mlpp", "tensor"),)}, "did you mean 'mlp'"),
    ],
)
def test_compute_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Compute(**values)


def test_configuration_needs_no_jax():
    code = "import sys, llama_jax.config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rules_name_axes_that_a_mesh_has():
    def changed(axes):
        return tuple((name, axes if name == "embed" else old) for name, old in DEFAULT_RULES)

    for axes in ("nope", "", ("fsdp", "nope")):
        with pytest.raises(ValueError, match="compute.rules: embed has no field"):
            Compute(rules=changed(axes))
    assert Compute(rules=changed(None)).rules == changed(None)
    with pytest.raises(ValueError, match="compute.rules says nothing about .*vocab"):
        Compute(rules=(("embed", "fsdp"),))
