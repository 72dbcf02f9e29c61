"""A configuration means what it means to PEFT, and a plan can be written down again."""

import re

import numpy as np
import pytest

from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.lora_plan import AdapterPlan, describe_plan, plan_adapter
from tests.tiny import FAMILIES, tiny_config

CONFIG = tiny_config(num_hidden_layers=12)


def modules(lora, config=CONFIG):
    """`q_proj@0,1` for each adapted weight."""
    plan = plan_adapter(config, lora)
    return {
        path.split(".")[-2]: np.flatnonzero(
            ranks.reshape(len(np.atleast_1d(ranks)), -1).any(1)
        ).tolist()
        for path, ranks in plan.ranks.items()
    }


ALL = list(range(12))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ("q_proj", "mlp.up_proj")}, {"q_proj": ALL, "up_proj": ALL}),
        ({"target_modules": ("layers.1.self_attn.q_proj",)}, {"q_proj": [1]}),
        (
            {"target_modules": r".*\.1\d?\.self_attn\.[qk]_proj"},
            {"q_proj": [1, 10, 11], "k_proj": [1, 10, 11]},
        ),
        ({"target_modules": ("q_proj",), "layers_to_transform": (0, 11)}, {"q_proj": [0, 11]}),
        (
            {
                "target_modules": ("q_proj", "model.layers.3.mlp.up_proj"),
                "layers_to_transform": (2,),
            },
            {"q_proj": [2], "up_proj": [3]},  # a full name is meant whatever its layer
        ),
        (
            {
                "target_modules": ("q_proj", "k_proj"),
                "exclude_modules": ("layers.0.self_attn.q_proj", "k_proj"),
            },
            {"q_proj": ALL[1:]},
        ),
        ({"target_modules": ("q_proj", "k_proj"), "exclude_modules": r".*k_proj"}, {"q_proj": ALL}),
        ({"target_modules": ("q_proj", "k_proj"), "modules_to_save": ("k_proj",)}, {"q_proj": ALL}),
        ({"target_modules": ("lm_head", "embed_tokens")}, {"lm_head": [0], "embed_tokens": [0]}),
    ],
)
def test_modules_are_matched_as_by_peft(options, expected):
    assert modules(LoraConfig(**options)) == expected


def test_all_linear_is_every_matrix_but_the_head():
    names = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert set(modules(LoraConfig())) == names
    assert set(modules(LoraConfig(target_modules="ALL-linear"))) == names
    mixtral = {"q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"}
    assert set(modules(LoraConfig(), FAMILIES["mixtral"])) == mixtral


def test_patterns_match_at_the_end_and_the_first_counts():
    lora = LoraConfig(
        r=2, lora_alpha=8, rank_pattern={r"layers\.1\.mlp\..*": 3, "up_proj": 4, "proj": 9}
    )
    assert lora.rank_of("model.layers.1.mlp.up_proj") == 3
    assert lora.rank_of("model.layers.11.mlp.up_proj") == 4
    assert lora.rank_of("model.layers.0.mlp.down_proj") == 2  # "proj" is no whole part
    assert lora.scale_of("model.layers.1.mlp.up_proj") == 8 / 3


def test_a_saved_name_means_all_that_end_with_it():
    plan = plan_adapter(CONFIG, LoraConfig(modules_to_save=("norm",)))
    assert plan.saved == {
        "norm.weight",
        "layers.input_layernorm.weight",
        "layers.post_attention_layernorm.weight",
    }
    plan = plan_adapter(CONFIG, LoraConfig(target_modules=("q_proj",), modules_to_save=("mlp",)))
    assert plan.saved == {f"layers.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "lora.r is 0; a rank is a positive integer"),
        ({"r": True}, "lora.r is True"),
        ({"lora_alpha": 0}, "lora.lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "it must be above 0, at most 1e30"),
        ({"lora_alpha": 10**400}, "lora.lora_alpha is 1000"),
        ({"r": 10**30}, "a rank is at most"),
        ({"modules_to_save": (5,)}, "holds 5; module names are strings"),
        ({"rank_pattern": []}, "lora.rank_pattern is []; give a mapping"),
        ({"alpha_pattern": "x"}, "lora.alpha_pattern is 'x'; give a mapping"),
        ({"use_rslora": 1}, "must be a boolean"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ("q_proj", 3)}, "holds 3"),
        ({"target_modules": "q_proj["}, "not a regular expression"),
        ({"modules_to_save": "lm_head"}, "give a list of module names"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
        ({"rank_pattern": {"(": 1}}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern['q_proj'] is '2'"),
        ({"layers_to_transform": ()}, "give a list of layer numbers"),
        ({"layers_to_transform": (-1,)}, "counted from 0"),
        ({"target_modules": ".*q", "layers_to_transform": (1,)}, "regular expression"),
    ],
)
def test_a_wrong_configuration_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("q_prj",)}, "no module 'q_prj'; did you mean 'q_proj'?"),
        ({"target_modules": ("q_proj", "c_attn")}, "no module 'c_attn'"),
        ({"target_modules": "q_proj"}, "matches no module of this model"),  # a fullmatch
        ({"target_modules": ("input_layernorm",)}, "is a norm"),
        ({"modules_to_save": ("lm_haed",)}, "did you mean 'lm_head'?"),
        ({"exclude_modules": ("q_prj",)}, "lora.exclude_modules"),
        (
            {"target_modules": ("q_proj",), "exclude_modules": ("v_proj",)},
            "lora.exclude_modules: 'v_proj' leaves out nothing that target_modules ('q_proj',)",
        ),
        ({"exclude_modules": ("k_proj", "lm_head")}, "'lm_head' leaves out nothing"),
        ({"exclude_modules": r"layers\..*"}, r"'layers\\..*' leaves out nothing"),  # a fullmatch
        (
            {"target_modules": ("q_proj", "embed_tokens"), "layers_to_transform": (1,)},
            "'embed_tokens' is in none of the layers that layers_to_transform [1] names",
        ),
        ({"rank_pattern": {"q_prj": 4}}, "lora.rank_pattern: 'q_prj' is the end of no module's"),
        ({"alpha_pattern": {"proj": 4}}, "lora.alpha_pattern: 'proj' is the end of no module's"),
        (
            {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"v_proj": 4}},
            "'v_proj' is the end of no module's name that gets an adapter; adapters are on q_proj, "
            "up_proj",
        ),
        (
            {"rank_pattern": {r".*proj": 4, "v_proj": 2}},
            "lora.rank_pattern: 'v_proj' decides nothing, because keys before it",
        ),
        ({"layers_to_transform": (12,)}, "12 layers, 0 to 11"),
        ({"modules_to_save": ("layers.0.input_layernorm",)}, "in some layers only"),
        ({"modules_to_save": ("proj",), "target_modules": ("q_proj",)}, "leave it out of one"),
        ({"ensure_weight_tying": True}, "are not tied"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_adapter(CONFIG, LoraConfig(**options))


def test_tied_weights_need_a_decision():
    tied = FAMILIES["llama-tied"]
    for options in (
        {"target_modules": ("q_proj", "embed_tokens")},
        {"modules_to_save": ("embed_tokens",)},
    ):
        with pytest.raises(ValueError, match="embedding is also its head"):
            plan_adapter(tied, LoraConfig(**options))
        plan = plan_adapter(tied, LoraConfig(**options, ensure_weight_tying=True))
        assert "embed_tokens.weight" in {*plan.ranks, *plan.saved}
    with pytest.raises(ValueError, match="its head is the embedding"):
        plan_adapter(tied, LoraConfig(target_modules=("lm_head",)))
    by_head = LoraConfig(target_modules=("lm_head",), ensure_weight_tying=True)
    assert set(plan_adapter(tied, by_head).ranks) == {"embed_tokens.weight"}
    assert "embed_tokens.weight" not in plan_adapter(tied, LoraConfig()).ranks


def test_experts_cannot_be_saved_whole():
    with pytest.raises(ValueError, match="cannot be saved whole"):
        plan_adapter(FAMILIES["mixtral"], LoraConfig(modules_to_save=("w1",)))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "lora_alpha": 10},
        {"r": 7, "lora_alpha": 0.3, "target_modules": ("q_proj",), "modules_to_save": ("norm",)},
        {"target_modules": ("q_proj", "v_proj"), "layers_to_transform": (3, 5)},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 5}},
        {"alpha_pattern": {r".*\.1\..*": 5, "down_proj": 64}},
        {"target_modules": ("embed_tokens", "lm_head"), "modules_to_save": ("model.norm",)},
    ],
)
def test_a_plan_is_described_and_understood_again(options, use_rslora):
    plan = plan_adapter(CONFIG, LoraConfig(**options, use_rslora=use_rslora))
    stored = AdapterPlan(
        plan.ranks,
        {path: s.astype(np.float32).astype(np.float64) for path, s in plan.scales.items()},
        plan.saved,
        plan.use_rslora,
    )
    again = plan_adapter(CONFIG, describe_plan(CONFIG, stored))
    assert again.saved == plan.saved
    assert again.use_rslora is use_rslora
    for path in plan.ranks:
        np.testing.assert_array_equal(again.ranks[path], plan.ranks[path])
        np.testing.assert_array_equal(again.scales[path], plan.scales[path])


def test_descriptions_are_short():
    plan = plan_adapter(CONFIG, LoraConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 4}))
    lora = describe_plan(CONFIG, plan)
    assert (lora.r, lora.lora_alpha) == (8, 16)
    assert lora.rank_pattern == {"q_proj": 4}
    assert lora.alpha_pattern == {}
    assert lora.target_modules == tuple(
        sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    )
    one = {"layers.4.self_attn.q_proj": 2}
    lora = describe_plan(CONFIG, plan_adapter(CONFIG, LoraConfig(rank_pattern=one)))
    assert lora.rank_pattern == {"model.layers.4.self_attn.q_proj": 2}
