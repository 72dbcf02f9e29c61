"""Vocabularies that differ, and whose tokenizer the result has."""

import numpy as np
import pytest

from llama_jax.formats.hf import load_hf
from llama_jax.formats.tokenizer import load_tokenizer
from tests.merge.folders import merge, save, tensors, words
from tests.tiny import tiny_config


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
    monkeypatch.setattr("llama_jax.merge.tensor._CHUNK_VALUES", 640)
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
