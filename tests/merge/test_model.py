"""Merged models: the papers' formulas on whole tensors, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.formats.hf import load_hf
from tests.merge.folders import constant, merge, save, tensors
from tests.tiny import FAMILIES, tiny_config, tiny_params


@pytest.mark.parametrize(("ratio", "expected"), [(1, 2.5), (0.5, 2.25), (0, 2.0), (-1, 1.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chat_vector_is_added(tmp_path, ratio, expected, dtype):
    """R79."""
    recipe = {"method": "chat_vector", "ratio": ratio}
    for name, value in (("base", 1.0), ("chat", 1.5), ("target", 2.0)):
        config, params = constant(value, dtype)
        recipe[name] = save(tmp_path / name, config, params=params)
    _, found = merge(tmp_path, recipe)
    for array in found.values():
        assert array.dtype.name == dtype and (array == expected).all()


def test_ratio_0_is_bit_identical_and_ratio_1_of_the_base_gives_the_chat_model(tmp_path, three):
    """R79: signs of zeros too, which adding 0 would change."""
    config, params = constant(-0.0)
    zeros = save(tmp_path / "zeros", config, params=params)
    for target in (zeros, three[2]):
        recipe = {"method": "chat_vector", "base": three[0], "chat": three[1], "target": target}
        merge(tmp_path, {**recipe, "ratio": 0}, overwrite=True)
        name = "model.safetensors"
        source = tmp_path / target / name
        assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()
    recipe = {"method": "chat_vector", "base": three[0], "chat": three[1], "target": three[0]}
    _, found = merge(tmp_path, {**recipe, "ratio": 1}, name="same")
    for name, array in tensors(tmp_path / "model1").items():
        np.testing.assert_array_equal(found[name], array)


def test_sums_are_rounded_once(tmp_path):
    """R57's numbers: in bfloat16 1 + 0.003 + 0.003 would stay 1."""
    config, base = constant(1.0, "bfloat16")
    models = []
    save(tmp_path / "base", config, params=base)
    for number in range(2):
        wide, changed = constant(1.003)
        models.append(save(tmp_path / f"m{number}", wide, params=changed))
    recipe = {"method": "task_arithmetic", "base": str(tmp_path / "base"), "models": models}
    _, found = merge(tmp_path, recipe)
    for array in found.values():
        assert array.dtype == ml_dtypes.bfloat16 and (array == 1.0078125).all()


# The papers' formulas, on whole tensors in float64.


def trimmed(delta, density):
    """The largest values; with random weights no two are equal."""
    count = max(1, int(density * delta.size))
    order = np.argsort(-np.abs(delta.reshape(-1)))[:count]
    kept = np.zeros(delta.size)
    kept[order] = delta.reshape(-1)[order]
    return kept.reshape(delta.shape)


def ties(base, others, weights, densities, scale):
    kept = [trimmed(o - base, d) for o, d in zip(others, densities, strict=True)]
    votes = sum(w * k for w, k in zip(weights, kept, strict=True))
    total, share = np.zeros_like(base), np.zeros_like(base)
    for weight, delta in zip(weights, kept, strict=True):
        agrees = (np.sign(weight * delta) == np.where(votes >= 0, 1, -1)) & (delta != 0)
        total += np.where(agrees, weight * delta, 0)
        share += np.where(agrees, weight, 0)
    return base + scale * total / np.where(share == 0, 1, share)


def slerp(a, b, t):
    flat = a.reshape(-1) / np.linalg.norm(a), b.reshape(-1) / np.linalg.norm(b)
    angle = np.arccos(flat[0] @ flat[1])
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


WEIGHTS = (0.7, 0.6)
CASES = {
    "linear": (
        {"method": "linear", "models": "all"},
        lambda a, b, c: (0.7 * a + 0.6 * b + 0.2 * c) / 1.5,
    ),
    "plain-linear": (
        {"method": "linear", "models": "all", "normalize": False},
        lambda a, b, c: 0.7 * a + 0.6 * b + 0.2 * c,
    ),
    "task": (
        {"method": "task_arithmetic", "scale": 0.5},
        lambda a, b, c: a + 0.5 * (0.7 * (b - a) + 0.6 * (c - a)),
    ),
    "task-normalized": (
        {"method": "task_arithmetic", "normalize": True},
        lambda a, b, c: a + (0.7 * (b - a) + 0.6 * (c - a)) / 1.3,
    ),
    "ties": (
        {"method": "ties", "density": 0.3, "scale": 1.5},
        lambda a, b, c: ties(a, (b, c), WEIGHTS, (0.3, 0.3), 1.5),
    ),
    "ties-all": (
        {"method": "ties", "density": 1.0},
        lambda a, b, c: ties(a, (b, c), WEIGHTS, (1.0, 1.0), 1.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_methods_are_the_papers_formulas(tmp_path, three, name, monkeypatch):
    monkeypatch.setattr("llama_jax.merge.tensor._CHUNK_VALUES", 1000)  # many pieces a tensor
    recipe, formula = CASES[name]
    recipe = dict(recipe)
    if recipe.get("models") == "all":
        weights = (0.7, 0.6, 0.2)
        recipe["models"] = [{"model": m, "weight": w} for m, w in zip(three, weights, strict=True)]
    else:
        recipe["base"] = three[0]
        recipe["models"] = [
            {"model": m, "weight": w} for m, w in zip(three[1:], WEIGHTS, strict=True)
        ]
    merged, found = merge(tmp_path, recipe)
    inputs = [tensors(tmp_path / f"model{i}") for i in range(3)]
    assert merged.tensors == len(found) == len(inputs[0])
    for tensor, array in found.items():
        wide = [each[tensor].astype(np.float64) for each in inputs]
        np.testing.assert_allclose(array, formula(*wide), atol=2e-7, err_msg=tensor)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(tmp_path, three, t, monkeypatch):
    monkeypatch.setattr("llama_jax.merge.tensor._CHUNK_VALUES", 1000)
    _, found = merge(tmp_path, {"method": "slerp", "models": three[:2], "t": t})
    inputs = [tensors(tmp_path / f"model{i}") for i in range(2)]
    for name, array in found.items():
        a, b = (each[name].astype(np.float64) for each in inputs)
        if t in (0.0, 1.0):
            np.testing.assert_array_equal(array, (a, b)[int(t)].astype(np.float32))
        elif name.endswith("norm.weight"):  # nearly parallel: along the line
            np.testing.assert_allclose(array, (1 - t) * a + t * b, rtol=0.05)
        else:
            np.testing.assert_allclose(array, slerp(a, b, t), atol=2e-7)


def test_dare_drops_at_random_and_keeps_the_mean(tmp_path, three):
    recipe = {"method": "dare", "base": three[0], "models": three[1:], "density": 0.4}
    _, found = merge(tmp_path, {**recipe, "models": three[1:2]})
    base, model = tensors(tmp_path / "model0"), tensors(tmp_path / "model1")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        delta = (model[name] - base[name]) / 0.4
        change = found[name] - base[name]
        dropped = np.abs(change) < 1e-7
        assert 0.55 < dropped.mean() < 0.65
        np.testing.assert_allclose(change[~dropped], delta[~dropped], atol=1e-6)
    _, again = merge(tmp_path, {**recipe, "models": three[1:2]}, name="again")
    _, other = merge(tmp_path, {**recipe, "models": three[1:2], "seed": 1}, name="other")
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(again[name], found[name])
    assert (other[name] != found[name]).mean() > 0.3
    _, whole = merge(tmp_path, {**recipe, "density": 1.0, "elect_sign": True}, name="whole")
    voted = {"method": "ties", "base": three[0], "models": three[1:], "density": 1.0}
    _, expected = merge(tmp_path, {**voted, "normalize": False}, name="expected")
    np.testing.assert_allclose(whole[name], expected[name], atol=1e-7)


def test_ties_counts_equal_values_in_order(tmp_path):
    """Half of a constant task vector is its first half."""
    models = []
    for number, value in enumerate((1.0, 1.5)):
        config, params = constant(value)
        models.append(save(tmp_path / f"m{number}", config, params=params))
    recipe = {"method": "ties", "base": models[0], "models": models[1:], "density": 0.5}
    _, found = merge(tmp_path, recipe)
    for array in found.values():
        flat, half = array.reshape(-1), array.size // 2
        assert (flat[:half] == 1.5).all() and (flat[half:] == 1.0).all()


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "llama-biases"])
def test_every_family_merges(tmp_path, family):
    config = FAMILIES[family]
    models = [save(tmp_path / f"m{seed}", config, seed=seed) for seed in range(2)]
    merge(tmp_path, {"method": "linear", "models": models})
    found, params = load_hf(tmp_path / "out")
    assert found == config
    for path, leaf in tree.flatten(params).items():
        mean = sum(tree.flatten(tiny_params(config, seed))[path] for seed in range(2)) / 2
        np.testing.assert_allclose(leaf, mean, atol=1e-6)


def test_models_of_other_shapes_are_refused(tmp_path):
    models = [save(tmp_path / "a"), save(tmp_path / "b", tiny_config(intermediate_size=64))]
    with pytest.raises(ValueError, match=r"models\[1\] .*gate_proj.weight of shape .*64"):
        merge(tmp_path, {"method": "linear", "models": models})
    models[1] = save(tmp_path / "c", FAMILIES["llama-tied"])
    with pytest.raises(ValueError, match=r"lm_head.weight of shape None"):
        merge(tmp_path, {"method": "linear", "models": models})


def test_an_interrupted_merge_leaves_nothing(tmp_path, three):
    def stop(done, total, name):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path, {"method": "linear", "models": three}, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model0", "model1", "model2"]
