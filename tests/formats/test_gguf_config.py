"""GGUF metadata to ModelConfig: defaults, refusals by name, rotary scaling."""

import json
import re

import numpy as np
import pytest
from gguf.constants import GGUFValueType

from llama_jax.config import MoeConfig, RopeScaling
from llama_jax.formats.gguf_config import (
    CONFIG_KEY,
    config_entries,
    own_entry,
    read_config,
    tokenizer_fields,
)
from llama_jax.formats.gguf_fields import PREFIX
from llama_jax.formats.gguf_rope import rope_factors
from tests.tiny import FAMILIES, tiny_config

BASE = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
SHAPES = {
    "token_embd.weight": (128, 64),
    "blk.0.attn_q.weight": (64, 64),
    "blk.1.attn_q.weight": (64, 64),
    "output.weight": (128, 64),
}


def read(changes=(), *, shapes=SHAPES, factors=None, drop=()):
    metadata = {key: value for key, value in {**BASE, **dict(changes)}.items() if key not in drop}
    if factors is not None:
        shapes = {**shapes, "rope_freqs.weight": factors.shape}
    return read_config(metadata, shapes, dtype="float32", read_factors=lambda: factors)


def test_the_defaults_are_those_of_llama_cpp():
    config = read()
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.rope_theta == 10000.0
    assert config.rope_scaling is None
    assert config.sliding_window is None
    assert config.vocab_size == 128
    assert config.model_type == "llama"
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, (), None)
    tied = {name: shape for name, shape in SHAPES.items() if name != "output.weight"}
    assert read(shapes=tied).tie_word_embeddings


def test_every_field_is_read():
    config = read(
        {
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 32,
            "llama.attention.value_length": 32,
            "llama.rope.dimension_count": 32,
            "llama.attention.scale": 32**-0.5,
            "llama.rope.freq_base": 500000.0,
            "llama.attention.sliding_window": 77,
            "llama.vocab_size": 128,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.ggml.eom_token_id": 2,
            "tokenizer.ggml.padding_token_id": 2**32 - 1,
        },
        shapes={**SHAPES, "blk.0.attn_q.bias": (64,), "blk.0.ffn_gate.bias": (96,)},
    )
    assert (config.num_key_value_heads, config.head_dim) == (2, 32)
    assert config.rope_theta == 500000.0
    assert config.sliding_window == 77
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2, 5), None)
    assert config.attention_bias and config.mlp_bias
    assert config.model_type == "mistral"


def test_experts_and_counts_given_for_each_layer():
    config = read(
        {
            "llama.expert_count": 8,
            "llama.expert_used_count": 2,
            "llama.attention.head_count": np.array([4, 4], np.int32),
        }
    )
    assert config.model_type == "mixtral"
    assert (config.moe.num_local_experts, config.moe.num_experts_per_tok) == (8, 2)
    assert config.num_attention_heads == 4


REFUSED = {
    "general.architecture": "qwen2",
    "general.type": "adapter",
    "split.count": 3,
    "llama.block_count": 3,
    "llama.vocab_size": 127,
    "llama.embedding_length": "64",
    "llama.context_length": -1,
    "llama.attention.head_count": np.array([4, 2], np.int32),
    "llama.attention.layer_norm_rms_epsilon": "small",
    "llama.attention.key_length": 17,
    "llama.attention.value_length": 8,
    "llama.rope.dimension_count": 8,
    "llama.attention.scale": 1.0,
    "llama.attention.clamp_kqv": 8.0,
    "llama.attention.max_alibi_bias": 8.0,
    "llama.attention.causal": False,
    "llama.attention.sliding_window_pattern": 4,
    "llama.logit_scale": 0.25,
    "llama.residual_scale": 0.2,
    "llama.embedding_scale": 12.0,
    "llama.attn_logit_softcapping": 50.0,
    "llama.final_logit_softcapping": 30.0,
    "llama.use_parallel_residual": True,
    "llama.expert_gating_func": 2,
    "llama.expert_shared_count": 1,
    "llama.expert_weights_scale": 2.5,
    "llama.rope.scaling.type": "longrope",
    "llama.rope.scaling.attn_factor": 1.2,
    "llama.rope.scaling.yarn_log_multiplier": 0.1,
    "llama.rope.dimension_sections": np.array([1, 2], np.int32),
    "llama.some_new_thing": 1,
    "tokenizer.ggml.eos_token_id": "2",
    CONFIG_KEY: "not JSON",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_change_the_mathematics_is_refused_by_name(key):
    with pytest.raises(ValueError, match=key.removeprefix("llama.").replace(".", r"\.")):
        read({key: REFUSED[key]})


@pytest.mark.parametrize("key", ["general.architecture", "general.type", "split.count"])
def test_an_array_in_place_of_one_value_is_named(key):
    with pytest.raises(ValueError, match=rf"{key} is array\(\[1, 1\]"):
        read({key: np.array([1, 1])})


def test_all_problems_are_said_at_once():
    with pytest.raises(ValueError) as error:
        read({"llama.new": 1, "llama.logit_scale": 3.0}, drop=["llama.context_length"])
    for word in ("llama.new", "llama.logit_scale", "llama.context_length is missing"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "key", [key for key in BASE if key.startswith("llama.")] + ["general.architecture"]
)
def test_what_is_required_is_named_when_missing(key):
    with pytest.raises(ValueError, match=key.removeprefix("llama.")):
        read(drop=[key])


def test_the_embedding_must_be_there():
    with pytest.raises(ValueError, match=r"token_embd\.weight"):
        read(shapes={"blk.0.attn_q.weight": (64, 64)})


def test_neutral_values_and_keys_about_the_origin_change_nothing():
    neutral = {
        "llama.attention.clamp_kqv": 0.0,
        "llama.attention.causal": True,
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 8.0,
        "llama.rope.scaling.finetuned": True,
        "llama.tensor_data_layout": "Meta AI original pth",
        "general.name": "x",
        "quantize.imatrix.file": "y",
    }
    assert read(neutral) == read()


ROPE = PREFIX + "rope.scaling."


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({ROPE + "type": "linear", ROPE + "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({ROPE + "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({PREFIX + "rope.scale_linear": 2.0}, RopeScaling("linear", 2.0)),
        ({ROPE + "type": "linear", ROPE + "factor": 0.0}, None),
        (
            {
                ROPE + "type": "yarn",
                ROPE + "factor": 4.0,
                ROPE + "original_context_length": 64,
                ROPE + "yarn_beta_fast": 16.0,
                ROPE + "yarn_ext_factor": -1.0,
            },
            RopeScaling("yarn", 4.0, original_max_position_embeddings=64, beta_fast=16.0),
        ),
    ],
)
def test_rotary_scaling_of_the_metadata(changes, expected):
    assert read(changes).rope_scaling == expected


LLAMA3 = {
    # (theta, head size, factor, original length, high)
    "8B": (500000.0, 128, 8.0, 8192, 4.0),
    "1B": (500000.0, 64, 32.0, 8192, 4.0),
    "tiny": (500000.0, 16, 8.0, 64, 4.0),
    "other band": (500000.0, 128, 4.0, 4096, 3.0),
    "nothing blended": (1e12, 4, 8.0, 8192, 4.0),
}


@pytest.mark.parametrize("case", LLAMA3)
def test_llama3_scaling_is_recovered_from_its_divisors(case):
    theta, head_dim, factor, length, high = LLAMA3[case]
    scaling = RopeScaling(
        "llama3",
        factor,
        original_max_position_embeddings=length,
        low_freq_factor=1.0,
        high_freq_factor=high,
    )
    config = tiny_config(rope_theta=theta, head_dim=head_dim, rope_scaling=scaling)
    factors = rope_factors(config)
    changes = {"llama.rope.freq_base": theta, "llama.attention.key_length": head_dim}
    again = read(changes, factors=factors)
    np.testing.assert_allclose(rope_factors(again), factors, rtol=1e-5)
    if case != "nothing blended":
        assert again.rope_scaling == scaling


@pytest.mark.parametrize(
    "factors",
    [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [1, 1, 1, 8],
        [0.5] * 8,
        [1, 1, 1, np.nan, 8, 8, 8, 8],
        # Inverse frequencies, as converters of 2023 wrote them.
        list(10000.0 ** -(np.arange(8) / 8)),
    ],
)
def test_other_divisors_are_refused(factors):
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        read(factors=np.array(factors, np.float32))


@pytest.mark.parametrize("theta", [0.0, -1.0, 1e-300, 1e300, np.inf, np.nan])
def test_a_base_that_gives_no_frequencies_is_named_beside_divisors(theta):
    with pytest.raises(ValueError, match=re.escape(f"rope_theta is {theta}")):
        read({"llama.rope.freq_base": theta}, factors=np.array([1, 1, 1, 2, 4, 8, 8, 8]))


def test_divisors_of_one_are_no_scaling_and_do_not_mix_with_one():
    assert read(factors=np.ones(8, np.float32)).rope_scaling is None
    with pytest.raises(ValueError, match="divisors as well"):
        read({ROPE + "factor": 4.0}, factors=rope_factors(FAMILIES["llama3-rope"]))


def _own(config, **changes):
    """What is stored for a config whose other entries give it with `changes`."""
    entry = own_entry(config, config.replace(**changes))
    return None if entry is None else json.loads(entry.value)


def test_only_what_gguf_cannot_say_is_stored_beside_it():
    config = tiny_config()
    assert _own(config) is None
    assert _own(config, model_type="mistral") == {"model_type": "llama"}
    moe = MoeConfig(4, 2, 0.02)
    stored = {CONFIG_KEY: json.dumps({"moe": vars(moe)})}
    experts = {"llama.expert_count": 4, "llama.expert_used_count": 2}
    assert read({**experts, **stored}).moe == moe
    eps = {CONFIG_KEY: json.dumps({"rms_norm_eps": 1.00000001e-5})}
    assert read(eps).rms_norm_eps == 1.00000001e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 32},
        {"rms_norm_eps": 2e-5},
        {"tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"moe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}},
        {"no_such_field": 1},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "no_such": 1}},
        {"eos_token_id": "5"},
        [],
    ],
)
def test_stored_fields_may_not_contradict_the_metadata(fields):
    with pytest.raises(ValueError, match=CONFIG_KEY):
        read({CONFIG_KEY: json.dumps(fields)})


def test_counts_are_written_as_uint32_and_numbers_as_float32():
    for entry in config_entries(FAMILIES["mixtral"]):
        expected = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
        assert entry.kind == expected[type(entry.value)], entry


def test_rows_without_a_token_and_absent_ids_are_left_out_of_the_tokenizer():
    fields = tokenizer_fields(
        {
            "tokenizer.ggml.tokens": ["a", "[PAD1]", "b", "[PAD3]", "[PAD4]"],
            "tokenizer.ggml.token_type": np.array([1, 5, 1, 5, 5], np.int32),
            "tokenizer.ggml.scores": np.zeros(5, np.float32),
            "tokenizer.ggml.bos_token_id": 2**32 - 1,
            "tokenizer.ggml.eos_token_id": 2,
            "llama.block_count": 2,
        }
    )
    assert fields["tokenizer.ggml.tokens"] == ["a", "[PAD1]", "b"]
    assert len(fields["tokenizer.ggml.token_type"]) == len(fields["tokenizer.ggml.scores"]) == 3
    assert "tokenizer.ggml.bos_token_id" not in fields
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert "llama.block_count" not in fields
    odd = {**fields, "tokenizer.ggml.scores": 5}  # refused with the tokenizer
    assert tokenizer_fields(odd)["tokenizer.ggml.scores"] == 5
