"""Adapters as inputs, and their sum as one adapter."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.formats.hf import load_hf
from llama_jax.formats.peft import load_adapter, save_adapter
from llama_jax.merge.model import merge_models
from llama_jax.weights.lora import add_lora, merge_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.merge_recipe import read_recipe
from tests.merge.folders import CONFIG, merge, save, tensors
from tests.tiny import FAMILIES, tiny_params


def adapter(folder, seed, config=CONFIG, **options):
    lora = LoraConfig(**{"r": 4, "lora_alpha": 12, **options})
    params = add_lora(config, tiny_params(config), lora, jax.random.key(seed))

    def moved(path, leaf):
        if not hasattr(leaf, "lora_b"):
            return leaf
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


def test_a_recipe_may_name_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "base", seed=0)
    lora = LoraConfig(r=2, target_modules=("q_proj",))
    params = add_lora(CONFIG, tiny_params(CONFIG), lora, jax.random.key(0))
    save_adapter(tmp_path / "own", CONFIG, params, base_model_name_or_path=None)
    recipe = {"method": "task_arithmetic", "base": "~/base", "models": ["~/own"]}
    merge_models(read_recipe(recipe, "r.yaml"), tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
