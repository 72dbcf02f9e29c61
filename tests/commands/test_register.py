"""`llama-jax register`: a model becomes a version that loads to the same parameters."""

import json

import jax
import numpy as np
import pytest

import llama_jax as lj
from infer.registry import Registry
from llama_jax import cli, tree
from llama_jax.demo.make_tokenizer import FOLDER as TOKENIZER
from llama_jax.formats.gguf import save_gguf
from llama_jax.formats.hf import save_hf
from llama_jax.formats.tokenizer import load_tokenizer
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import quantize, stored_types
from tests.tiny import tiny_config, tiny_params


@pytest.fixture
def model(tmp_path):
    config = tiny_config(vocab_size=264, bos_token_id=None, eos_token_id=(258,))
    folder = tmp_path / "tiny"
    save_hf(folder, config, tiny_params(config), tokenizer=load_tokenizer(TOKENIZER))
    return folder


def test_a_registered_model_is_the_same_model(model, tmp_path, capsys):
    root = tmp_path / "models"
    argv = ["register", str(model), "--models-dir", str(root), "--name", "m", "--json"]
    assert cli.main([*argv, "--version", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantization"] is None and report["bytes"] > 0
    manifest = Registry(root).verify("m", "1", hashes=True)
    loaded = lj.load(Registry(root).folder("m", "1") / manifest.model)
    given = lj.load(model)
    for path, leaf in tree.flatten(given.params).items():
        assert np.array_equal(leaf, tree.flatten(loaded.params)[path])
    assert cli.main([*argv, "--version", "1"]) == 2
    assert "versions never change" in capsys.readouterr().err
    assert cli.main([*argv, "--version", "../2"]) == 2


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_the_manifest_says_how_a_model_is_quantized(model, tmp_path, capsys, scheme):
    small = tmp_path / scheme
    assert cli.main(["quantize", str(model), str(small), "--scheme", scheme]) == 0
    root = tmp_path / "models"
    argv = ["register", str(small), "--models-dir", str(root), "--name", "m", "--version", "1"]
    assert cli.main(argv) == 0
    assert f"{Registry(root).manifest('m', '1').quantization}" == scheme
    jax.clear_caches()


def test_the_manifest_of_a_gguf_file_names_its_blocks(tmp_path):
    file, root, config = tmp_path / "m.gguf", tmp_path / "models", tiny_config()
    save_gguf(file, config, tiny_params(config), None, dtype="q4_0")
    argv = ["register", str(file), "--models-dir", str(root), "--name", "m", "--version", "1"]
    assert cli.main(argv) == 0
    assert Registry(root).manifest("m", "1").quantization == "Q4_0, Q8_0"


def test_adapters_do_not_hide_how_their_base_is_quantized():
    config = tiny_config()
    params = quantize(config, tiny_params(config), scheme="nf4")
    adapted = add_lora(config, params, LoraConfig(r=2), jax.random.key(0))
    assert stored_types(adapted) == "nf4"


def test_what_is_no_model_is_not_copied(tmp_path, capsys):
    argv = ["register", "--models-dir", str(tmp_path / "r"), "--name", "m", "--version", "1"]
    assert cli.main([*argv, str(tmp_path)]) == 2
    assert cli.main([*argv, "smollm2-135m", "--template", "nowhere"]) == 2
    assert not (tmp_path / "r").exists()
