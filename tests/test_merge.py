"""Merging: the papers' formulas on whole tensors, vocabularies, adapters, and what is refused."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import yaml

from llama_jax import cli, tree
from llama_jax.formats.hf import load_hf, save_hf
from llama_jax.formats.peft import load_adapter, save_adapter
from llama_jax.formats.safetensors import SafetensorsFile
from llama_jax.formats.tokenizer import load_tokenizer
from llama_jax.merge import merge_models
from llama_jax.weights.lora import add_lora, merge_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.merge_recipe import read_recipe
from tests.tiny import FAMILIES, tiny_config, tiny_params

CONFIG = FAMILIES["llama-gqa"]


def write_tokenizer(folder, words):
    """A word-level tokenizer whose id i is words[i]."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    )
    backend.save(str(folder / "tokenizer.json"))


def words(count):
    return [f"w{i}" for i in range(count)]


def save(folder, config=CONFIG, seed=0, params=None, tokens=None):
    """A model folder: random weights, or the given ones."""
    save_hf(folder, config, tiny_params(config, seed) if params is None else params)
    if tokens is not None:
        write_tokenizer(folder, tokens)
    return str(folder)


def tensors(folder) -> dict[str, np.ndarray]:
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: np.asarray(file.view(name)) for name in file.header.tensors}


def merge(tmp_path, recipe, name="out", **options):
    merged = merge_models(read_recipe(recipe, "recipe"), tmp_path / name, **options)
    return merged, tensors(tmp_path / name)


@pytest.fixture
def three(tmp_path):
    return [save(tmp_path / f"model{seed}", seed=seed) for seed in range(3)]


def constant(value: float, dtype="float32"):
    config = CONFIG.replace(dtype=dtype)
    return config, tree.unflatten(
        {
            path: jnp.full(leaf.shape, value, dtype)
            for path, leaf in tree.flatten(tiny_params(CONFIG)).items()
        }
    )


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
    monkeypatch.setattr("llama_jax.merge._CHUNK_VALUES", 1000)  # many pieces a tensor
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
    monkeypatch.setattr("llama_jax.merge._CHUNK_VALUES", 1000)
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


# Vocabularies


def vocabularies(tmp_path, sizes=(120, 122, 120), names=("base", "chat", "target")):
    recipe = {"method": "chat_vector", "ratio": 1.0}
    for seed, (name, size) in enumerate(zip(names, sizes, strict=True)):
        recipe[name] = save(tmp_path / name, tiny_config(vocab_size=size), seed=seed)
    return recipe


@pytest.mark.parametrize("sizes", [(120, 122, 120), (120, 122, 125), (125, 120, 122)])
def test_vocabularies_of_different_sizes_need_a_policy(tmp_path, sizes):
    """R78."""
    recipe = vocabularies(tmp_path, sizes)
    with pytest.raises(ValueError, match="the vocabularies differ") as error:
        merge(tmp_path, recipe)
    assert all(str(size) in str(error.value) for size in sizes)
    assert not (tmp_path / "out").exists()

    merged, found = merge(tmp_path, {**recipe, "vocabulary": "shared rows"})
    common = min(sizes)
    assert merged.shared_rows == common
    base, chat, target = (tensors(tmp_path / name) for name in ("base", "chat", "target"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = target[name].copy()
        expected[:common] += chat[name][:common] - base[name][:common]
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
        assert found[name][common:].tobytes() == target[name][common:].tobytes()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(found[name], target[name])

    _, kept = merge(tmp_path, {**recipe, "vocabulary": "keep"}, name="kept")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert kept[name].tobytes() == target[name].tobytes()
    assert not np.array_equal(kept["model.norm.weight"], target["model.norm.weight"])


def test_rows_of_different_tokens_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.merge._CHUNK_VALUES", 640)
    recipe = {"method": "linear", "models": []}
    swapped = words(128)
    swapped[5], swapped[50] = swapped[50], swapped[5]
    for seed, tokens in enumerate((words(128), swapped)):
        recipe["models"].append(save(tmp_path / f"m{seed}", seed=seed, tokens=tokens))
    with pytest.raises(ValueError, match=r"2 rows .* different tokens \(5 is 'w5' or 'w50'; 50"):
        merge(tmp_path, recipe)
    merged, found = merge(tmp_path, {**recipe, "vocabulary": "shared_rows"})
    assert merged.shared_rows == 126
    own, other = (tensors(tmp_path / f"m{seed}")["lm_head.weight"] for seed in range(2))
    expected = (own + other) / 2
    expected[[5, 50]] = own[[5, 50]]
    np.testing.assert_allclose(found["lm_head.weight"], expected, atol=1e-6)
    assert found["lm_head.weight"][5].tobytes() == own[5].tobytes()


def test_the_tokenizer_comes_from_the_named_model(tmp_path):
    recipe = {"method": "chat_vector", "ratio": 1.0}
    for seed, name in enumerate(("base", "chat", "target")):
        config = tiny_config(eos_token_id=(seed + 2,))
        tokens = words(100 + seed)
        recipe[name] = save(tmp_path / name, config, seed=seed, tokens=tokens)
    recipe["vocabulary"] = "shared_rows"
    merge(tmp_path, recipe)
    assert load_tokenizer(tmp_path / "out").vocab_size == 102
    merge(tmp_path, {**recipe, "tokenizer": "chat"}, name="chatty")
    assert load_tokenizer(tmp_path / "chatty").vocab_size == 101
    ends = [load_hf(tmp_path / name)[0].eos_token_id for name in ("out", "chatty")]
    assert ends == [(4,), (3,)]
    large = save(tmp_path / "large", tiny_config(vocab_size=140), tokens=words(140))
    with pytest.raises(ValueError, match="has ids up to 139"):
        merge(tmp_path, {**recipe, "tokenizer": large}, name="never")
    with pytest.raises(ValueError, match="brings no tokenizer"):
        bare = save(tmp_path / "bare")
        merge(tmp_path, {**recipe, "tokenizer": bare}, name="never")


# Adapters


def adapter(folder, seed, config=CONFIG, **options):
    lora = LoraConfig(**{"r": 4, "lora_alpha": 12, **options})
    params = add_lora(config, tiny_params(config), lora, jax.random.key(seed))

    def moved(path, leaf):
        if not hasattr(leaf, "lora_b"):
            return leaf
        import dataclasses

        return dataclasses.replace(
            leaf, lora_b=jax.random.normal(jax.random.key(seed), leaf.lora_b.shape)
        )

    params = tree.map_with_path(moved, params)
    save_adapter(folder, config, params, base_model_name_or_path=None)
    return str(folder), tree.flatten(merge_lora(params))


@pytest.mark.parametrize("family", ["llama-gqa", "mixtral"])
def test_adapters_are_task_vectors_of_their_base(tmp_path, family):
    config = FAMILIES[family]
    base = save(tmp_path / "base", config)
    own = tree.flatten(tiny_params(config))
    first, one = adapter(tmp_path / "a1", 1, config, target_modules=["q_proj", "v_proj"])
    second, two = adapter(tmp_path / "a2", 2, config, target_modules=["q_proj", "o_proj"])
    models = [{"model": first, "weight": 0.5}, {"model": second, "weight": -0.25}]
    merge(tmp_path, {"method": "task_arithmetic", "base": base, "models": models})
    _, params = load_hf(tmp_path / "out")
    for path, leaf in tree.flatten(params).items():
        expected = own[path] + 0.5 * (one[path] - own[path]) - 0.25 * (two[path] - own[path])
        np.testing.assert_allclose(leaf, expected, atol=1e-5, err_msg=path)
    recipe = {"method": "chat_vector", "base": base, "chat": first, "target": base, "ratio": 1}
    merge(tmp_path, recipe, name="chat")
    for path, leaf in tree.flatten(load_hf(tmp_path / "chat")[1]).items():
        np.testing.assert_allclose(leaf, one[path], atol=1e-5)


def test_adapters_with_saved_modules_merge_too(tmp_path):
    base = save(tmp_path / "base")
    folder, whole = adapter(tmp_path / "a", 1, modules_to_save=["lm_head"])
    recipe = {"method": "ties", "base": base, "models": [folder], "density": 1.0}
    merge(tmp_path, recipe)
    for path, leaf in tree.flatten(load_hf(tmp_path / "out")[1]).items():
        np.testing.assert_allclose(leaf, whole[path], atol=1e-5)


def test_an_adapter_without_a_base_is_refused(tmp_path):
    base = save(tmp_path / "base")
    folder, _ = adapter(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="PEFT adapter, which means something only on its base"):
        merge(tmp_path, {"method": "linear", "models": [base, folder]})


ADAPTER = {"method": "task_arithmetic", "output": "adapter"}


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "mixtral"])
def test_adapters_add_up_to_an_adapter(tmp_path, family):
    """Of other ranks, other modules, other scales: the same model as the merge into the base."""
    config = FAMILIES[family]
    base = save(tmp_path / "base", config)
    kinds = [
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    ]
    if family == "llama-gqa":
        kinds[0]["rank_pattern"] = {"layers.1.self_attn.q_proj": 1}
    folders = [adapter(tmp_path / f"a{n}", n, config, **kind)[0] for n, kind in enumerate(kinds)]
    models = [{"model": each, "weight": w} for each, w in zip(folders, (0.5, -0.25), strict=True)]
    recipe = {**ADAPTER, "base": base, "models": models, "scale": 1.5, "normalize": True}
    with pytest.raises(ValueError, match="one file; leave max_shard_size"):
        merge_models(read_recipe(recipe, "recipe"), tmp_path / "sum", max_shard_size="1GB")
    merged = merge_models(read_recipe(recipe, "recipe"), tmp_path / "sum")
    assert {path.name for path in merged.files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    _, expected = merge(tmp_path, {**recipe, "output": "model"})
    params = load_adapter(tmp_path / "sum", config, tiny_params(config))
    save(tmp_path / "applied", config, params=merge_lora(params))
    for name, value in tensors(tmp_path / "applied").items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)
    described = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == base


@pytest.mark.filterwarnings("ignore")
def test_the_sum_is_that_of_peft(tmp_path):
    import peft
    import torch
    import transformers

    base = save(tmp_path / "base")
    kinds = [{"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 3}]
    folders = [
        adapter(tmp_path / f"a{n}", n, target_modules=["q_proj", "down_proj"], **kind)[0]
        for n, kind in enumerate(kinds)
    ]
    models = [{"model": each, "weight": w} for each, w in zip(folders, (0.7, 0.2), strict=True)]
    merge_models(read_recipe({**ADAPTER, "base": base, "models": models}, "r"), tmp_path / "sum")

    def fresh():
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    theirs = peft.PeftModel.from_pretrained(fresh(), folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.2], "both", combination_type="cat")
    theirs.set_adapter("both")
    ours = peft.PeftModel.from_pretrained(fresh(), tmp_path / "sum")
    ids = torch.arange(24)[None] % CONFIG.vocab_size
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max()
    assert difference < 1e-5


def test_a_sum_of_adapters_sums_what_they_trained_whole(tmp_path):
    base = save(tmp_path / "base")
    first, one = adapter(tmp_path / "a1", 1, modules_to_save=["lm_head"])
    second, two = adapter(tmp_path / "a2", 2, target_modules=["q_proj", "lm_head"])
    models = [{"model": first, "weight": 0.5}, {"model": second, "weight": 2.0}]
    recipe = {**ADAPTER, "base": base, "models": models, "dtype": "float32"}
    merge_models(read_recipe(recipe, "recipe"), tmp_path / "sum")
    own = tree.flatten(tiny_params(CONFIG))
    found = tree.flatten(merge_lora(load_adapter(tmp_path / "sum", CONFIG, tiny_params(CONFIG))))
    for path, leaf in found.items():
        expected = own[path] + 0.5 * (one[path] - own[path]) + 2 * (two[path] - own[path])
        np.testing.assert_allclose(leaf, expected, atol=1e-5, err_msg=path)


def test_only_adapters_add_up_to_an_adapter(tmp_path, three):
    folder, _ = adapter(tmp_path / "a", 1)
    recipe = {**ADAPTER, "base": three[0], "models": [folder, three[1]]}
    with pytest.raises(ValueError, match=r"models\[1\] .* is a model and no PEFT adapter"):
        merge_models(read_recipe(recipe, "recipe"), tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
    for changes, message in (
        ({"method": "ties", "density": 1.0}, "output is set, but method ties does not read it"),
        ({"output": "adaptor"}, "did you mean 'adapter'"),
        ({"tokenizer": "base"}, "output is an adapter, which has none"),
    ):
        with pytest.raises(ValueError, match=message):
            read_recipe({**ADAPTER, "base": three[0], "models": [folder], **changes}, "recipe")


# Refusals


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


CHAT = {"method": "chat_vector", "base": "b", "chat": "c", "target": "t", "ratio": 1}
TIES = {"method": "ties", "base": "b", "models": ["m"], "density": 0.5}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "a recipe is a mapping"),
        ({}, "the recipe has no method"),
        ({**CHAT, "method": "chat_vectors"}, "did you mean 'chat_vector'"),
        ({**CHAT, "ration": 1}, "no field 'ration'; did you mean 'ratio'"),
        ({k: v for k, v in CHAT.items() if k != "ratio"}, "the recipe has no ratio"),
        ({k: v for k, v in CHAT.items() if k != "chat"}, "the recipe has no chat"),
        ({**CHAT, "ratio": "1"}, "ratio is '1'; it must be a finite number"),
        ({**CHAT, "ratio": float("nan")}, "ratio is nan"),
        ({**CHAT, "ratio": True}, "ratio is True"),
        ({**CHAT, "chat": ""}, "chat is ''; it must name"),
        ({**CHAT, "density": 0.5}, "density is set, but method chat_vector does not read it"),
        (
            {**TIES, "models": [{"model": "m", "density": 0.2}]},
            "each of models has its own",
        ),
        ({**CHAT, "dtype": "int8"}, "dtype is 'int8'; allowed are float32"),
        ({**CHAT, "vocabulary": "shared_row"}, "did you mean 'shared_rows'"),
        ({**CHAT, "tokenizer": 3}, "tokenizer is 3"),
        ({**TIES, "models": []}, r"models is \[\]"),
        ({**TIES, "models": "m"}, "give a list of models"),
        ({**TIES, "models": [{"model": "m", "wieght": 1}]}, "did you mean 'weight'"),
        ({**TIES, "models": [{"weight": 1}]}, r"models\[0\] has no model"),
        ({**TIES, "density": 1.5}, "between 0.0 and 1.0"),
        ({"method": "ties", "base": "b", "models": ["m"]}, "density is missing"),
        ({**TIES, "models": [{"model": "m", "weight": 0}]}, "add up to 0"),
        ({**TIES, "method": "dare", "density": 0}, "must be above 0"),
        ({**TIES, "method": "dare", "seed": -1}, "seed is -1"),
        ({**TIES, "method": "dare", "elect_sign": "yes"}, "elect_sign is 'yes'"),
        ({"method": "slerp", "models": ["a", "b", "c"], "t": 0.5}, "exactly two"),
        ({"method": "slerp", "models": ["a", "b"], "t": 2}, "t is 2"),
        ({"method": "linear", "models": [{"model": "a", "density": 1}]}, "no field 'density'"),
    ],
)
def test_recipes_are_checked(recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(recipe, "r.yaml")
    assert str(error.value).startswith("r.yaml: ")


# The command


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_reports_and_refuses(tmp_path, three, capsys):
    recipe = tmp_path / "recipe.yaml"
    values = {"method": "ties", "base": three[0], "models": three[1:], "density": 0.5}
    recipe.write_text(yaml.safe_dump({**values, "dtype": "bfloat16"}))
    out = tmp_path / "out"
    code, text, _ = run(capsys, "merge", recipe, out, "--json", "--max-shard-size", "40KB")
    assert code == 0
    report = json.loads(text)
    assert report["tensors"] == len(tensors(tmp_path / "model0"))
    assert report["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert report["peak_host_bytes"] > 20e6
    assert (out / "model.safetensors.index.json").is_file()
    assert load_hf(out)[0].dtype == "bfloat16"
    code, _, error = run(capsys, "merge", recipe, out)
    assert code == 2 and "not empty" in error
    code, _, error = run(capsys, "merge", recipe, three[1], "--overwrite")
    assert code == 2 and "or lies in it" in error
    recipe.write_text("method: ties\nbase: nowhere\nmodels: [x]\ndensity: 0.5\n")
    code, _, error = run(capsys, "merge", recipe, tmp_path / "never")
    assert code == 2 and "nowhere" in error and not (tmp_path / "never").exists()
    code, _, error = run(capsys, "merge", tmp_path / "none.yaml", out)
    assert code == 2 and "none.yaml" in error


def test_the_peak_is_that_of_the_process(tmp_path, three):
    """A process that holds 300 MB more reports 300 MB more."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": "linear", "models": three}))
    program = (
        "import sys, numpy as np; from llama_jax import cli; "
        "held = np.ones(int(sys.argv[1]), np.uint8); "
        "sys.exit(cli.main(['merge', sys.argv[2], sys.argv[3], '--json']))"
    )
    peaks = []
    for size in (1, 300_000_000):
        command = [sys.executable, "-c", program, str(size), str(recipe), str(tmp_path / str(size))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout)["peak_host_bytes"])
    assert 250e6 < peaks[1] - peaks[0] < 350e6


def test_a_recipe_may_name_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "base", seed=0)
    lora = LoraConfig(r=2, target_modules=("q_proj",))
    params = add_lora(CONFIG, tiny_params(CONFIG), lora, jax.random.key(0))
    save_adapter(tmp_path / "own", CONFIG, params, base_model_name_or_path=None)
    recipe = {"method": "task_arithmetic", "base": "~/base", "models": ["~/own"]}
    merge_models(read_recipe(recipe, "r.yaml"), tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
