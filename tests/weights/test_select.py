"""Masks choose exactly the arrays they name, by pattern and by role, and refuse the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.model.layout import unstack_layers
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import quantize
from llama_jax.weights.select import decay_mask, trainable_mask
from llama_jax.weights.table import weight_table
from tests.tiny import FAMILIES, tiny_config, tiny_params

CONFIG = FAMILIES["llama-biases"]
PARAMS = tiny_params(CONFIG)
POST = "post_attention_layernorm"


def chosen(mask):
    return {path for path, keep in tree.flatten_arrays(mask).items() if keep}


@pytest.mark.parametrize("family", ["llama-biases", "llama-tied", "mixtral"])
def test_full_without_patterns_trains_every_array(family):
    config = FAMILIES[family]
    mask = trainable_mask(config, tiny_params(config), None, method="full")
    assert chosen(mask) == set(weight_table(config))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["lm_head"], {"lm_head.weight"}),
        (["norm"], {"norm.weight"}),
        (["q_proj"], {"layers.self_attn.q_proj.weight", "layers.self_attn.q_proj.bias"}),
        (["q_proj.bias"], {"layers.self_attn.q_proj.bias"}),
        (["layers.mlp.*.weight"], {f"layers.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}),
        (
            ["*norm*", "!norm"],
            {f"layers.{n}_layernorm.weight" for n in ("input", "post_attention")},
        ),
        (["role:embedding", "role:head"], {"embed_tokens.weight", "lm_head.weight"}),
        (["!layers", "!embed_tokens"], {"norm.weight", "lm_head.weight"}),
    ],
)
def test_patterns(patterns, expected):
    assert chosen(trainable_mask(CONFIG, PARAMS, patterns, method="full")) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["qproj"], "did you mean 'q_proj'"),
        (["lm_head", "layers.mlp.gateproj"], "'layers.mlp.gateproj' matches no weight"),
        (["role:matrx"], "roles bias, embedding, head, matrix, norm"),
        (["layers.1.mlp"], "stacked in one array"),
        (["layers.[0-1].mlp"], "stacked in one array"),
        (["!*"], "leave nothing to train"),
        ([], "patterns is empty"),
        ("lm_head", "give a list"),
    ],
)
def test_patterns_that_mean_nothing(patterns, message):
    with pytest.raises(ValueError) as error:
        trainable_mask(CONFIG, PARAMS, patterns, method="full")
    assert message in str(error.value)


def test_single_layers_where_layers_are_apart():
    apart = unstack_layers(PARAMS)
    mask = trainable_mask(CONFIG, apart, ["layers.1.mlp", "!role:bias"], method="full")
    assert chosen(mask) == {f"layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    every = trainable_mask(CONFIG, apart, ["layers.self_attn.q_proj.weight"], method="full")
    assert chosen(every) == {f"layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_lora_trains_factors_and_saved_copies_only():
    lora = LoraConfig(r=2, target_modules=("q_proj", "down_proj"), modules_to_save=("lm_head",))
    params = add_lora(CONFIG, PARAMS, lora, jax.random.key(0))
    adapted = {"layers.self_attn.q_proj.weight", "layers.mlp.down_proj.weight"}
    factors = {f"{path}.{name}" for path in adapted for name in ("lora_a", "lora_b")}
    mask = trainable_mask(CONFIG, params, None, method="lora")
    assert chosen(mask) == factors | {"lm_head.weight.saved"}
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    some = trainable_mask(CONFIG, params, ["q_proj"], method="lora")
    assert chosen(some) == {f for f in factors if "q_proj" in f}
    with pytest.raises(ValueError, match="only weights without an adapter"):
        trainable_mask(CONFIG, params, ["q_proj", "up_proj"], method="lora")
    with pytest.raises(ValueError, match="has an adapter"):
        trainable_mask(CONFIG, params, None, method="full")
    selected, rest = tree.partition(params, mask)
    assert len(jax.tree.leaves(selected)) == 5
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, tree.combine(selected, rest), params))


def test_methods_that_do_not_fit_the_tree():
    with pytest.raises(ValueError, match="no weight has one"):
        trainable_mask(CONFIG, PARAMS, None, method="lora")
    with pytest.raises(ValueError, match="allowed are lora, full"):
        trainable_mask(CONFIG, PARAMS, None, method="qlora")
    quantized = quantize(CONFIG, PARAMS, scheme="nf4")
    with pytest.raises(ValueError, match="quantized, so it has no gradient"):
        trainable_mask(CONFIG, quantized, None, method="full")
    assert chosen(trainable_mask(CONFIG, quantized, ["role:norm"], method="full")) == {
        path for path, row in weight_table(CONFIG).items() if row.role == "norm"
    }
    with pytest.raises(ValueError, match=r"hold block\.weight, which this model does not have"):
        decay_mask(CONFIG, {**PARAMS, "block": {"weight": jnp.zeros(2)}})


def test_masks_of_shapes_equal_masks_of_arrays():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert decay_mask(CONFIG, shapes) == decay_mask(CONFIG, PARAMS)


def test_decay_follows_the_role_not_the_number_of_axes():
    """R51: stacked norm scales and biases are [layers, hidden] and yet do not decay."""
    mask = tree.flatten_arrays(decay_mask(CONFIG, PARAMS))
    for path, row in weight_table(CONFIG).items():
        assert mask[path] == (row.role not in ("norm", "bias")), path
    stacked = tree.flatten_arrays(PARAMS)["layers.input_layernorm.weight"]
    assert stacked.ndim == 2
    decayed = jax.tree.map(
        lambda x, decays: x - 0.1 * x if decays else x, PARAMS, decay_mask(CONFIG, PARAMS)
    )
    flat = tree.flatten_arrays(decayed)
    np.testing.assert_array_equal(flat["layers.input_layernorm.weight"], stacked)
    assert float(jnp.abs(flat["lm_head.weight"] - PARAMS["lm_head"]["weight"]).max()) > 0


def test_adapters_decay_and_scales_do_not():
    config = tiny_config()
    lora = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("input_layernorm",))
    base = quantize(config, tiny_params(config), scheme="int8")
    mask = tree.flatten_arrays(decay_mask(config, add_lora(config, base, lora, jax.random.key(0))))
    q_proj = "layers.self_attn.q_proj.weight"
    assert mask[f"{q_proj}.lora_a"]
    assert mask[f"{q_proj}.lora_b"]
    assert not mask[f"{q_proj}.scale"]
    assert not mask[f"{q_proj}.base.qvalue"]
    assert not mask[f"{q_proj}.base.scale"]
    assert not mask["layers.input_layernorm.weight.saved"]
    assert mask["embed_tokens.weight"]
