"""The closed form of a step's operations against what its jaxpr holds, on published shapes."""

import jax
import pytest

from llama_jax.kernels.splash import visited_share
from llama_jax.mesh.flops import count_flops
from llama_jax.mesh.sharding import make_mesh
from llama_jax.model.flops import Trained, executed_flops, layer_weights, model_flops
from llama_jax.presets import presets
from llama_jax.weights.table import abstract_params, num_parameters
from train.config import RunConfig
from train.fit import trained_weights
from train.setup import make_setup

LENGTH = 1024


def counted_and_formula(preset, method, **compute):
    config = presets[preset]
    run = RunConfig.from_dict(
        {
            "model": {"name": preset, "init": "random", "tokenizer": "unused"},
            "method": method,
            "data": {"train": "unused.jsonl"},
            "mesh": {"fsdp": -1},
            "compute": {"dtype": "bfloat16", **compute},
            "train": {"steps": 1, "batch_size": 8, "sequence_length": LENGTH},
            "output": "unused",
        }
    )
    mesh = make_mesh({"fsdp": 8})
    setup = make_setup(run, config, abstract_params(config), mesh)
    with jax.set_mesh(mesh):
        traced = setup.step.trace(setup.abstract, setup.batch_struct(8))
    shares = None
    if compute.get("attention") == "splash":
        shares = {"splash": visited_share(LENGTH, config.sliding_window)}
    counted = count_flops(traced.jaxpr, kernel_shares=shares)
    formula = executed_flops(
        config,
        run.compute,
        tokens=8 * LENGTH,
        length=LENGTH,
        trained=trained_weights(setup, config),
    )
    return counted, formula


@pytest.mark.parametrize(
    ("preset", "method", "compute"),
    [
        ("llama3.1-8b", "full", {"remat": "full", "attention": "splash"}),
        ("llama3.1-8b", "lora", {"remat": "full", "attention": "splash"}),
        ("llama3.1-8b", "full", {"remat": "none"}),
        ("llama3.1-8b", "lora", {"remat": "dots"}),
        ("llama3.1-405b", "full", {"remat": "full", "attention": "splash"}),
        ("llama3.2-1b", "full", {"remat": "full"}),
        ("llama3.2-1b", "full", {"remat": "full", "attention": "splash"}),
        ("mistral-7b-v0.1", "full", {"remat": "full", "attention": "splash"}),
        ("smollm2-135m", "lora", {"remat": "none"}),
    ],
)
def test_dense_steps_are_within_one_percent(preset, method, compute):
    counted, formula = counted_and_formula(preset, method, **compute)
    assert counted == pytest.approx(formula, rel=0.01)


@pytest.mark.parametrize("moe", ["grouped", "dense"])
def test_mixtral_is_within_three_percent(moe):
    counted, formula = counted_and_formula(
        "mixtral-8x7b", "full", remat="full", attention="splash", moe=moe
    )
    assert counted == pytest.approx(formula, rel=0.03)


def test_what_must_be_done_is_six_operations_a_weight():
    config = presets["llama3.1-8b"]
    weights = num_parameters(config) - config.vocab_size * config.hidden_size
    tokens, length = 10, 1
    done = model_flops(config, tokens=tokens, length=length, trained=Trained(True, True))
    assert done == pytest.approx(6 * weights * tokens, rel=1e-3)


def test_a_window_bounds_the_keys_a_query_meets():
    config = presets["mistral-7b-v0.1"]
    frozen = Trained(False, False)
    long = model_flops(config, tokens=1, length=32768, trained=frozen)
    per_key = 3 * 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    products = 4.0 * (layer_weights(config) + config.vocab_size * config.hidden_size)
    assert (long - products) / per_key == pytest.approx(4096 * (1 - 4095 / 2 / 32768), rel=1e-3)
