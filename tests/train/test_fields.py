"""Every field of the run config changes something: the lowered step, the state, or the data."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, MoeConfig
from llama_jax.weights.quantized import PackedTensor, is_quantized
from tests.train.test_loop import TINY, config
from train.build import build, lower
from train.config import RunConfig
from train.setup import init_random, make_state

pytestmark = pytest.mark.compiled_quickly

# section.field -> (what else must be set, the value that must make a difference)
LOWERED = {
    "optimizer.name": ({}, "lion"),
    "optimizer.learning_rate": ({}, 0.5),
    "optimizer.beta1": ({}, 0.5),
    "optimizer.beta2": ({}, 0.5),
    "optimizer.epsilon": ({}, 0.5),
    "optimizer.weight_decay": ({}, 0.5),
    "optimizer.max_grad_norm": ({}, None),
    "optimizer.momentum": ({"optimizer": {"name": "sgd"}}, 0.5),
    "optimizer.offload": ({}, True),
    "optimizer.decay_rate": ({"optimizer": {"name": "adafactor"}}, 0.5),
    "schedule.name": ({}, "linear"),
    "schedule.warmup_steps": ({}, 3),
    "schedule.decay_steps": ({}, 2),
    "schedule.final_ratio": ({}, 0.5),
    "mesh.data": ({"mesh": {"fsdp": -1}}, 2),
    "mesh.fsdp": ({"mesh": {"data": -1, "fsdp": 1}}, 2),
    "mesh.tensor": ({"mesh": {"data": -1, "fsdp": 1}}, 2),
    "mesh.expert": ({"mesh": {"data": -1, "fsdp": 1}}, 2),
    "mesh.cpu_devices": ({"mesh": {"data": -1, "fsdp": 1}}, 4),
    "compute.dtype": ({}, "bfloat16"),
    "compute.param_dtype": ({}, "bfloat16"),
    "compute.accumulation_dtype": ({"compute": {"dtype": "bfloat16"}}, "bfloat16"),
    "compute.remat": ({}, "full"),
    "compute.moe": ({}, "dense"),
    "compute.moe_chunk_tokens": ({"compute": {"remat": "full"}}, 64),
    "compute.loss_chunk_tokens": ({}, 64),
    "compute.rules": ({}, [*(rule for rule in DEFAULT_RULES if rule[0] != "mlp"), ("mlp", None)]),
    "train.steps": ({}, 9),
    "train.batch_size": ({}, 16),
    "train.sequence_length": ({}, 64),
    "train.gradient_accumulation_steps": ({}, 2),
    "train.trainable": ({}, ["q_proj"]),
    "lora.r": ({}, 3),
    "lora.lora_dropout": ({}, 0.5),
    "lora.target_modules": ({}, ["q_proj"]),
    "lora.exclude_modules": ({}, ["q_proj"]),
    "lora.rank_pattern": ({}, {"q_proj": 3}),
    "lora.modules_to_save": ({"lora": {}, "model__overrides": None}, ["lm_head"]),
    "model.dtype": ({}, "bfloat16"),
    "model.overrides": ({}, {**TINY, "intermediate_size": 64}),
}
UNTIED = {**TINY, "tie_word_embeddings": False}
EXPERTS = {
    **TINY,
    "moe": dataclasses.asdict(
        MoeConfig(num_local_experts=2, num_experts_per_tok=1, router_aux_loss_coef=0.1)
    ),
}
DEFAULT_MESH = {"fsdp": 2, "tensor": 2, "cpu_devices": 4}


def lowered(run: RunConfig) -> str:
    _, setup, _ = build(run)
    with jax.set_mesh(setup.mesh):
        return lower(setup).as_text()


_before: dict[str, str] = {}


def lowered_before(folder, needs: dict) -> str:
    """Most fields are changed from the same run, whose step is lowered once."""
    key = json.dumps(needs, sort_keys=True)
    if key not in _before:
        _before[key] = lowered(config(folder, **needs))
    return _before[key]


@pytest.mark.parametrize("field", LOWERED)
def test_the_step_notices(tmp_path, field):
    needs, value = LOWERED[field]
    needs = {"mesh": DEFAULT_MESH, "train__batch_size": 8, **needs}
    if needs.pop("model__overrides", ...) is None:
        needs["model__overrides"] = UNTIED
    if field in ("compute.moe", "compute.moe_chunk_tokens", "mesh.expert"):
        needs["model__overrides"] = EXPERTS
    section, _, name = field.partition(".")
    after = config(tmp_path, **{**needs, f"{section}__{name}": value})
    assert lowered(after) != lowered_before(tmp_path, needs)


def test_a_cache_that_nothing_fills_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compute.cache_dtype is int8, but this run generates no"):
        build(config(tmp_path, compute={"cache_dtype": "int8"}))
    build(config(tmp_path, compute={"cache_dtype": "int8"}, train__sample_prompts=["a"]))


def test_the_scale_of_adapters_follows_alpha_and_its_rule(tmp_path):
    def scale(**lora):
        _, setup, _ = build(config(tmp_path, lora={"r": 4, **lora}))
        with jax.set_mesh(setup.mesh):
            state = make_state(setup, init_random(setup))
        return float(tree.flatten(state.params)["layers.mlp.up_proj.weight"].scale[0])

    assert scale(lora_alpha=8) == 2.0
    assert scale(lora_alpha=12) == 3.0
    assert scale(lora_alpha=8, use_rslora=True) == 4.0
    assert scale(lora_alpha=8, alpha_pattern={"up_proj": 16.0}) == 4.0


def abstract(run: RunConfig) -> dict:
    return tree.flatten(build(run)[1].abstract.params)


def test_dtypes_of_trained_and_frozen_weights(tmp_path):
    run = config(tmp_path, model__dtype="bfloat16")
    leaf = abstract(run)["layers.mlp.up_proj.weight"]
    assert (leaf.base.dtype, leaf.lora_a.dtype) == (jnp.bfloat16, jnp.float32)
    as_stored = config(tmp_path, model__dtype="bfloat16", compute={"param_dtype": None})
    assert abstract(as_stored)["layers.mlp.up_proj.weight"].lora_a.dtype == jnp.bfloat16


def test_the_base_of_qlora_is_stored_as_the_section_says(tmp_path):
    path = "layers.mlp.up_proj.weight"

    def base(**section):
        run = config(tmp_path, method="qlora", mesh=DEFAULT_MESH, quantization=section)
        return abstract(run)[path].base

    assert isinstance(base(), PackedTensor) and base().codebook == "nf4"
    assert base(scheme="int4").codebook == "int4"
    assert base(tile=16).tile == 16
    assert not is_quantized(base(skip=["up_proj"]))


def test_the_seed_decides_weights_and_order(tmp_path):
    def of(seed):
        _, setup, data = build(config(tmp_path, train__seed=seed))
        batches = data.batches(setup.run)
        next(batches)
        with jax.set_mesh(setup.mesh):
            return np.asarray(init_random(setup)["norm"]["weight"]), batches.samples, setup

    (_, first, one), (_, second, other) = of(1), of(2)
    assert first != second
    embeddings = [
        np.asarray(init_random(setup)["embed_tokens"]["weight"]) for setup in (one, other)
    ]
    assert not np.array_equal(*embeddings)


def test_data_fields_decide_the_rows(tmp_path):
    def first(**changes):
        run = config(tmp_path, **changes)
        _, _, data = build(run)
        batches = data.batches(run)
        next(batches)
        return batches.samples, len(data.train.groups), data.eval

    _, num_packed, evaluation = first()
    assert evaluation is not None
    samples, num_rows, _ = first(data__packing=False)
    assert len(samples) == 4 and num_rows > num_packed
    assert first(data__packing=False, data__shuffle=False)[0] == [0, 1, 2, 3]
    nothing = first(data__eval_fraction=0.0, train__eval_every_steps=None)
    assert nothing[2] is None
