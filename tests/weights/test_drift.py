"""What a merge does to weights, in numbers that can be worked out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.model import transformer
from llama_jax.weights.drift import drift, rebased
from llama_jax.weights.lora import add_lora, merge_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import quantize
from llama_jax.weights.tensors import to_array
from tests.adapters import trained
from tests.tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
UP = "layers.mlp.up_proj.weight"


def adapted():
    base = quantize(CONFIG, PARAMS, scheme="nf4")
    return trained(CONFIG, add_lora(CONFIG, base, LoraConfig(r=4), jax.random.key(0)))


def test_drift_is_the_rounding_of_the_matrices_written():
    """R58: onto the dequantized base nothing moves but by the cast."""
    params = adapted()
    assert drift(params, params, dtype="float32") < 1e-7
    leaves = [leaf for leaf in tree.flatten(params).values() if hasattr(leaf, "lora_a")]
    exact = [np.asarray(to_array(leaf), np.float64) for leaf in leaves]
    half = [np.asarray(to_array(leaf, dtype=jnp.bfloat16), np.float64) for leaf in leaves]
    error = sum(((a - b) ** 2).sum() for a, b in zip(half, exact, strict=True))
    expected = np.sqrt(error / sum((a**2).sum() for a in exact))
    assert drift(params, params, dtype="bfloat16") == pytest.approx(expected, rel=1e-4)
    assert 1e-3 < expected < 2**-8
    merged, tokens = merge_lora(params, dtype="bfloat16"), tiny_tokens()
    got = transformer.forward(CONFIG, merged, tokens)
    wanted = transformer.forward(CONFIG, params, tokens)
    scale = float(jnp.abs(wanted).max())
    assert 0 < float(jnp.abs(got - wanted).max()) < 2**-5 * scale


def test_merging_onto_the_originals_brings_back_what_quantization_took():
    params = adapted()
    onto = rebased(params, PARAMS)
    np.testing.assert_array_equal(tree.flatten(onto)[UP].base, tree.flatten(PARAMS)[UP])
    delta = tree.flatten(params)[UP].delta()
    np.testing.assert_allclose(
        to_array(tree.flatten(onto)[UP]), tree.flatten(PARAMS)[UP] + delta, atol=1e-6
    )
    assert 0.02 < drift(params, onto, dtype="float32") < 0.12
    assert drift(PARAMS, PARAMS, dtype="bfloat16") == 0.0


def test_an_adapter_goes_onto_another_model_whatever_its_own_base_is():
    lora = LoraConfig(r=4, target_modules=("up_proj",), modules_to_save=("lm_head",))
    params = trained(CONFIG, add_lora(CONFIG, PARAMS, lora, jax.random.key(0)))
    other = tiny_params(CONFIG, seed=1)
    onto, base = tree.flatten(rebased(params, other)), tree.flatten(other)
    delta = tree.flatten(params)[UP].delta()
    np.testing.assert_allclose(to_array(onto[UP]), base[UP] + delta, atol=1e-6)
    np.testing.assert_array_equal(onto["norm.weight"], base["norm.weight"])
    saved = onto["lm_head.weight"].saved
    np.testing.assert_array_equal(saved, tree.flatten(params)["lm_head.weight"].saved)
    with pytest.raises(ValueError, match="holds neither an adapter nor quantized weights"):
        rebased(PARAMS, other)


def test_another_model_is_refused():
    params = adapted()
    other = tiny_config(intermediate_size=112)
    with pytest.raises(ValueError, match=r"\(2, 64, 96\), but \(2, 64, 112\)"):
        rebased(params, tiny_params(other))
    with pytest.raises(ValueError, match="is quantized or adapted in the model to merge onto"):
        rebased(params, params)
    biased = tiny_config(attention_bias=True)
    with pytest.raises(ValueError, match=r"differ in layers\.self_attn\.k_proj\.bias"):
        rebased(params, tiny_params(biased))
