"""Adapters start as nothing, compute what the formula says, and come off and merge exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.model import transformer
from llama_jax.model.layout import unstack_layers
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.dot import dot, embed
from llama_jax.weights.lora import (
    adapters,
    add_lora,
    apply_adapters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import quantize
from llama_jax.weights.select import trainable_mask
from llama_jax.weights.tensors import to_array
from tests.adapters import trained
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
TOKENS = tiny_tokens()
Q_PROJ = "layers.self_attn.q_proj.weight"


@functools.partial(jax.jit, static_argnums=0)
def _run(config, params):
    return transformer.forward(config, params, TOKENS)


def forward(params, config=CONFIG):
    return np.asarray(_run(config, params))


def tensor(base, a, b, scale, **options):
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return LoraTensor(base, a, b, jnp.float32(scale), (a.shape[-2],), **options)


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama-biases", LoraConfig(r=4, modules_to_save=("norm", "embed_tokens"))),
        ("llama-tied", LoraConfig(target_modules=("embed_tokens",), ensure_weight_tying=True)),
        ("mixtral", LoraConfig(r=2, target_modules=("q_proj", "gate", "w1", "w2"))),
    ],
)
def test_a_fresh_adapter_changes_no_bit(family, lora):
    config = FAMILIES[family]
    params = tiny_params(config)
    adapted = add_lora(config, params, lora, jax.random.key(0))
    np.testing.assert_array_equal(forward(adapted, config), forward(params, config))
    moved = forward(trained(config, adapted), config)
    assert np.abs(moved - forward(params, config)).max() > 0.01
    assert_same_trees(remove_lora(adapted), params)


def test_fresh_factors_are_drawn_as_peft_draws_them():
    lora = LoraConfig(r=16, target_modules=("q_proj", "down_proj", "embed_tokens"))
    leaves = tree.flatten(add_lora(CONFIG, PARAMS, lora, jax.random.key(0)))
    for path, inner in ((Q_PROJ, 64), ("layers.mlp.down_proj.weight", 96)):
        a = np.asarray(leaves[path].lora_a)
        assert a.dtype == np.float32
        assert not leaves[path].lora_b.any()
        bound = inner**-0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert abs(a.std() - bound / 3**0.5) < 0.05 * bound  # uniform, not normal
        assert not np.array_equal(a[0], a[1])
    embedding = leaves["embed_tokens.weight"]
    assert not embedding.lora_b.any()
    assert abs(float(embedding.lora_a.std()) - 1.0) < 0.1
    again = tree.flatten(add_lora(CONFIG, PARAMS, lora, jax.random.key(1)))
    assert not np.array_equal(again[Q_PROJ].lora_a, leaves[Q_PROJ].lora_a)
    half = add_lora(CONFIG, PARAMS, lora, jax.random.key(0), param_dtype="bfloat16")
    assert tree.flatten(half)[Q_PROJ].lora_a.dtype == jnp.bfloat16


def test_scale_is_alpha_over_r():
    """R52: 12 / 4 = 3; ones [4, 5] and [3, 4] give 5 * 4 * 3 = 60."""
    config = tiny_config(hidden_size=64)
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=("q_proj",))
    leaf = tree.flatten(add_lora(config, PARAMS, lora, jax.random.key(0)))[Q_PROJ]
    np.testing.assert_array_equal(leaf.scale, [3.0, 3.0])
    one = tensor(jnp.zeros((3, 5)), np.ones((4, 5)), np.ones((3, 4)), leaf.scale[0])
    np.testing.assert_array_equal(dot(jnp.ones((1, 5)), one, compute=Compute()), [[60.0] * 3])
    np.testing.assert_array_equal(to_array(one) @ jnp.ones(5), [60.0] * 3)


@pytest.mark.parametrize(("use_rslora", "scale"), [(True, 8.0), (False, 2.0)])
def test_rslora_scale(use_rslora, scale):
    """R53: 32 / sqrt(16) against 32 / 16."""
    lora = LoraConfig(r=16, lora_alpha=32, use_rslora=use_rslora, target_modules=("q_proj",))
    leaf = tree.flatten(add_lora(CONFIG, PARAMS, lora, jax.random.key(0)))[Q_PROJ]
    assert leaf.use_rslora is use_rslora
    np.testing.assert_array_equal(leaf.scale, [scale, scale])


def test_delta_is_out_by_in():
    """R56, and a square layer with asymmetric values, where a transposition would not show in
    the shape."""
    leaf = tensor(jnp.zeros((2, 3)), [[2, 0, 1], [0, 3, 0]], np.eye(2), 1.0)
    np.testing.assert_array_equal(leaf.delta(), [[2, 0, 1], [0, 3, 0]])
    np.testing.assert_array_equal(leaf.delta().T, [[2, 0], [0, 3], [1, 0]])
    square = tensor(jnp.zeros((2, 2)), [[1, 2]], [[3], [5]], 1.0)
    np.testing.assert_array_equal(square.delta(), [[3, 6], [5, 10]])
    got = dot(jnp.array([[1.0, 0.0]]), square, compute=Compute())
    np.testing.assert_array_equal(got, [[3, 5]])


def test_products_equal_the_explicit_matrix():
    keys = jax.random.split(jax.random.key(0), 4)
    base = jax.random.normal(keys[0], (24, 16))
    leaf = tensor(base, jax.random.normal(keys[1], (3, 16)), jax.random.normal(keys[2], (24, 3)), 2)
    two = tensor(leaf, jax.random.normal(keys[3], (1, 16)), np.ones((24, 1)), 0.5)
    x, ids = jax.random.normal(keys[3], (2, 5, 16)), jnp.array([[3, 23], [0, 3]])
    for weight in (leaf, two, SavedTensor(leaf, base + 1)):
        matrix = to_array(weight)
        np.testing.assert_allclose(
            dot(x, weight, compute=Compute()), x @ matrix.T, rtol=1e-5, atol=1e-4
        )
        np.testing.assert_allclose(
            embed(weight, ids, compute=Compute()), matrix[ids], rtol=1e-5, atol=1e-5
        )
    np.testing.assert_allclose(to_array(leaf), base + 2 * leaf.lora_b @ leaf.lora_a, rtol=1e-5)


def test_merging_rounds_once():
    """R57: 1 + 0.003 + 0.003 in float32 is 1.0078125 in bfloat16; rounding twice leaves 1.0."""
    one = tensor(jnp.ones((1, 1), jnp.bfloat16), [[0.003]], [[1.0]], 1.0)
    two = {"layers": {}, "lm_head": {"weight": tensor(one, [[0.003]], [[1.0]], 1.0)}}
    merged = merge_lora(two)["lm_head"]["weight"]
    assert merged.dtype == jnp.bfloat16
    assert float(merged[0, 0]) == 1.0078125
    twice = merge_lora({"w": tensor(merge_lora({"w": one})["w"], [[0.003]], [[1.0]], 1.0)})
    assert float(twice["w"][0, 0]) == 1.0


@pytest.mark.parametrize("family", ["llama-biases", "mixtral"])
def test_merged_equals_unmerged(family):
    config = FAMILIES[family]
    lora = LoraConfig(r=3, lora_alpha=5, modules_to_save=("input_layernorm",))
    params = trained(config, add_lora(config, tiny_params(config), lora, jax.random.key(0)))
    merged = merge_lora(params)
    assert all(isinstance(leaf, jax.Array) for leaf in tree.flatten(merged).values())
    np.testing.assert_allclose(forward(merged, config), forward(params, config), atol=1e-5)
    half = merge_lora(params, dtype="bfloat16")
    assert tree.flatten(half)[Q_PROJ].dtype == jnp.bfloat16
    assert tree.flatten(half)["norm.weight"] is tree.flatten(params)["norm.weight"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_merging_onto_a_quantized_base(scheme):
    """R58: what is merged is what was trained on, unless the originals are asked for."""
    quantized = quantize(CONFIG, PARAMS, scheme=scheme)
    params = trained(CONFIG, add_lora(CONFIG, quantized, LoraConfig(r=4), jax.random.key(0)))
    leaf = tree.flatten(params)[Q_PROJ]
    merged = merge_lora(params)
    expected = to_array(tree.flatten(quantized)[Q_PROJ]) + leaf.delta()
    got = tree.flatten(merged)[Q_PROJ]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)
    half = tree.flatten(merge_lora(params, dtype="bfloat16"))[Q_PROJ]
    np.testing.assert_array_equal(half, got.astype(jnp.bfloat16))
    np.testing.assert_allclose(forward(merged), forward(params), atol=1e-5)
    onto = tree.flatten(merge_lora(params, onto=PARAMS))[Q_PROJ]
    np.testing.assert_allclose(onto, tree.flatten(PARAMS)[Q_PROJ] + leaf.delta(), atol=1e-6)
    assert float(jnp.abs(onto - got).max()) > 1e-3
    with pytest.raises(ValueError, match="onto holds no unadapted weight"):
        merge_lora(params, onto={"layers": {}})


def test_gradients_through_a_quantized_base():
    """QLoRA: the same as on the matrices that the base stands for."""
    quantized = quantize(CONFIG, PARAMS, scheme="nf4")
    lora = LoraConfig(r=2, target_modules=("q_proj", "down_proj"))
    params = trained(CONFIG, add_lora(CONFIG, quantized, lora, jax.random.key(0)))
    plain = tree.map_with_path(lambda _, leaf: to_array(leaf), quantized)
    parts = adapters(params)

    def gradient(params):
        mask = trainable_mask(CONFIG, params, None, method="lora")
        part, rest = tree.partition(params, mask)

        def loss(part):
            whole = tree.combine(part, rest)
            compute = Compute(remat="full")
            return (transformer.forward(CONFIG, whole, TOKENS, compute=compute) ** 2).mean()

        return jax.tree.leaves(jax.grad(loss)(part))

    got, expected = gradient(params), gradient(apply_adapters(plain, parts))
    assert len(got) == len(expected) == 4
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.abs(np.asarray(a)).max() > 1e-4


def test_unmerging():
    params = trained(CONFIG, add_lora(CONFIG, PARAMS, LoraConfig(r=4), jax.random.key(0)))
    parts = adapters(params)
    back = unmerge_lora(merge_lora(params), parts)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, params)
    assert_same_trees(apply_adapters(remove_lora(params), parts), params)
    with pytest.raises(ValueError, match="not a merged weight"):
        unmerge_lora(quantize(CONFIG, PARAMS, scheme="int8"), parts)
    saved = add_lora(CONFIG, PARAMS, LoraConfig(modules_to_save=("norm",)), jax.random.key(0))
    with pytest.raises(ValueError, match=r"norm\.weight were replaced"):
        unmerge_lora(merge_lora(saved), adapters(saved))


def test_layers_may_differ_in_rank():
    lora = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 5},
        alpha_pattern={"v_proj": 1.0},
    )
    fresh = add_lora(CONFIG, PARAMS, lora, jax.random.key(0))
    assert not tree.flatten(fresh)[Q_PROJ].lora_a[0, 2:].any()
    params = trained(CONFIG, fresh)
    leaf = tree.flatten(params)[Q_PROJ]
    assert leaf.ranks == (2, 5)
    np.testing.assert_allclose(leaf.scale, [2.0, 0.8])
    np.testing.assert_allclose(
        tree.flatten(params)["layers.self_attn.v_proj.weight"].scale, [0.5, 0.5]
    )
    assert leaf.lora_a[0, :2].all()
    assert not leaf.lora_a[0, 2:].any()
    np.testing.assert_allclose(forward(unstack_layers(params)), forward(params), atol=1e-5)

    def loss(part, rest):
        return (transformer.forward(CONFIG, tree.combine(part, rest), TOKENS) ** 2).mean()

    part, rest = tree.partition(params, trainable_mask(CONFIG, params, None, method="lora"))
    gradient = tree.flatten(jax.jit(jax.grad(loss))(part, rest))[Q_PROJ]
    assert gradient.lora_a[1, 4].any()
    assert gradient.lora_b[1, :, 4].any()
    assert not gradient.lora_a[0, 2:].any()
    assert not gradient.lora_b[0, :, 2:].any()


def test_layers_to_transform_leaves_the_others_alone():
    lora = LoraConfig(r=2, target_modules=("q_proj",), layers_to_transform=(1,))
    params = trained(CONFIG, add_lora(CONFIG, PARAMS, lora, jax.random.key(0)))
    leaf = tree.flatten(params)[Q_PROJ]
    assert leaf.ranks == (0, 2)
    assert not leaf.delta()[0].any()
    assert leaf.delta()[1].any()
    assert np.isfinite(np.asarray(leaf.scale)).all()


def test_saved_weights_are_what_the_model_uses():
    names = ("norm", "lm_head", "embed_tokens", "q_proj")
    config = FAMILIES["llama-biases"]
    lora = LoraConfig(target_modules=("v_proj",), modules_to_save=names)
    base = quantize(config, tiny_params(config), scheme="int8")
    params = add_lora(config, base, lora, jax.random.key(0))
    start = forward(params, config)
    np.testing.assert_allclose(start, forward(base, config), atol=1e-5)
    leaves = tree.flatten(params)
    saved = {path for path, leaf in leaves.items() if isinstance(leaf, SavedTensor)}
    assert saved == {
        "embed_tokens.weight",
        "lm_head.weight",
        "norm.weight",
        "layers.input_layernorm.weight",
        "layers.post_attention_layernorm.weight",
        "layers.self_attn.q_proj.weight",
        "layers.self_attn.q_proj.bias",
    }
    for path in saved:
        changed = dict(leaves)
        changed[path] = dataclasses.replace(leaves[path], saved=leaves[path].saved * 1.5)
        tuned = tree.unflatten(changed)
        assert np.abs(forward(tuned, config) - start).max() > 1e-3, path
        assert tree.flatten(remove_lora(tuned))[path] is tree.flatten(base)[path]


def test_trees_that_cannot_be_adapted():
    adapted = add_lora(CONFIG, PARAMS, LoraConfig(r=2), jax.random.key(0))
    with pytest.raises(ValueError, match=r"has an adapter already .*merge_lora or take it off"):
        add_lora(CONFIG, adapted, LoraConfig(r=2), jax.random.key(0))
    with pytest.raises(ValueError, match="added to stacked layers"):
        add_lora(CONFIG, unstack_layers(PARAMS), LoraConfig(r=2), jax.random.key(0))
    with pytest.raises(ValueError, match="has an adapter already"):
        apply_adapters(adapted, adapters(adapted))
    other = tiny_config(intermediate_size=48)
    with pytest.raises(ValueError, match=r"is for shape \(2, 64, 96\), but the weight has"):
        apply_adapters(tiny_params(other), adapters(adapted))


def test_shapes_alone_can_be_adapted():
    lora = LoraConfig(r=2, modules_to_save=("norm",))
    shapes = jax.eval_shape(lambda p: add_lora(CONFIG, p, lora, jax.random.key(0)), PARAMS)
    adapted = add_lora(CONFIG, PARAMS, lora, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(adapted)
