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
from llama_jax.formats.peft import save_adapter
from llama_jax.formats.tokenizer import load_tokenizer
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import quantize, stored_types
from tests.tiny import tiny_config, tiny_params


def model_config(**changes):
    return tiny_config(vocab_size=264, bos_token_id=None, eos_token_id=(258,), **changes)


@pytest.fixture
def model(tmp_path):
    config = model_config()
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


def refused(model, root, capsys, *options):
    """What register says; it leaves nothing, so the version may be used again."""
    argv = ["register", str(model), "--models-dir", str(root), "--name", "m", "--version", "1"]
    assert cli.main([*argv, *map(str, options)]) == 2
    assert not root.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (b"{% for %}", "chat.jinja: chat template, line 1"),
        (b"caf\xe9", "chat.jinja is not a text in UTF-8"),
        (b" \n", "chat.jinja is empty"),
        (b'{{ "".__class__.__mro__ }}', "chat.jinja: chat template reaches for '__mro__'"),
        (b'{{ ""|attr("__cla" ~ "ss__") }}', "chat.jinja: chat template reaches for '__class__'"),
    ],
)
def test_templates_that_no_chat_can_use_are_refused(
    model, tmp_path, capsys, template, said
):  # R113
    path = tmp_path / "chat.jinja"
    path.write_bytes(template)
    assert said in refused(model, tmp_path / "models", capsys, "--template", path)


def test_a_model_whose_own_template_reaches_out_is_refused(model, tmp_path, capsys):  # R113
    own, root = model / "chat_template.jinja", tmp_path / "models"
    own.write_text('{% if tools %}{{ "".__class__ }}{% endif %}')
    assert "'default' is refused: chat template reaches for" in refused(model, root, capsys)
    argv = ["register", str(model), "--models-dir", str(root), "--name", "m", "--version"]
    other = tmp_path / "chat.jinja"
    other.write_text("{{ messages[0].content }}")
    assert cli.main([*argv, "1", "--template", str(other)]) == 0
    own.write_text("{{ raise_exception('give a system message') }}")
    assert cli.main([*argv, "2"]) == 0


def test_a_template_may_refuse_a_conversation(model, tmp_path):
    path, root = tmp_path / "chat.jinja", tmp_path / "models"
    path.write_text("{{ raise_exception('give a system message') }}")
    argv = ["register", str(model), "--models-dir", str(root), "--name", "m", "--version", "1"]
    assert cli.main([*argv, "--template", str(path)]) == 0
    assert Registry(root).verify("m", "1", hashes=True).template == "template.jinja"


def test_what_is_no_adapter_of_the_model_is_refused(model, tmp_path, capsys):
    root, empty, file = tmp_path / "models", tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("x")
    for path in (empty, file, model):
        said = refused(model, root, capsys, "--adapter", path)
        assert f"{path} holds no adapter_config.json, so it is not a PEFT adapter" in said
    own, other = tmp_path / "own", tmp_path / "other"
    for folder, config in ((own, model_config()), (other, model_config(hidden_size=32))):
        params = add_lora(config, tiny_params(config), LoraConfig(r=2), jax.random.key(0))
        save_adapter(folder, config, params, base_model_name_or_path=None)
    assert "shape" in refused(model, root, capsys, "--adapter", other)
    argv = ["register", str(model), "--models-dir", str(root), "--name", "m", "--version", "1"]
    assert cli.main([*argv, "--adapter", str(own)]) == 0
    manifest = Registry(root).verify("m", "1", hashes=True)
    folder = Registry(root).folder("m", "1")
    lj.load(folder / manifest.model, adapter=folder / manifest.adapter)
    (own / "adapter_model.safetensors").unlink()
    assert cli.main([*argv[:-1], "2", "--adapter", str(own)]) == 2
    assert "holds no adapter_model.safetensors" in capsys.readouterr().err


def test_what_is_no_model_is_not_copied(tmp_path, capsys):
    argv = ["register", "--models-dir", str(tmp_path / "r"), "--name", "m", "--version", "1"]
    assert cli.main([*argv, str(tmp_path)]) == 2
    assert cli.main([*argv, "smollm2-135m", "--template", "nowhere"]) == 2
    assert not (tmp_path / "r").exists()
