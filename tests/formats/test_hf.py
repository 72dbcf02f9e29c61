"""Hugging Face folders: the same bytes through import and export, and refusals that name things."""

import functools
import json
import logging
import shutil
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from llama_jax import tree
from llama_jax.formats import safetensors as st
from llama_jax.formats.hf import load_hf, save_hf
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.model.transformer import forward
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.quantize import quantize
from llama_jax.weights.table import weight_table
from llama_jax.weights.tensors import to_array
from tests.reference import reference_logits, reference_model
from tests.tiny import FAMILIES, quantize_array, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_params = functools.cache(tiny_params)
_logits = jax.jit(forward, static_argnums=0)


def _save_reference(folder, config, *, dtype="float32", **options):
    """A folder as transformers writes it; returns the model."""
    model = reference_model(config, _params(config)).to(DTYPES[dtype])
    model.save_pretrained(folder, **options)
    return model


def _tensors(folder):
    """Name -> (dtype, shape, bytes) of all tensors, by the library, not by our reader."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in safetensors.torch.load_file(path).items():
            assert name not in result
            raw = value.contiguous().view(torch.uint8).numpy().tobytes()
            result[name] = (value.dtype, tuple(value.shape), raw)
    return result


def _rewrite(folder, change):
    """Applies `change` to the dictionary of a single-file folder's tensors."""
    path = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})


def _edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "llama"
    _save_reference(folder, FAMILIES["llama-gqa"])
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_import_then_export_gives_the_same_bytes(tmp_path, name, dtype):
    config = FAMILIES[name]
    _save_reference(tmp_path / "in", config, dtype=dtype)
    read, params = load_hf(tmp_path / "in")
    assert read == config.replace(dtype=dtype)
    assert {leaf.dtype for leaf in tree.flatten(params).values()} == {jnp.dtype(dtype)}
    save_hf(tmp_path / "out", read, params)
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "in")


@pytest.mark.parametrize("name", FAMILIES)
def test_R18_export_is_the_same_model_to_transformers(tmp_path, name):
    config = FAMILIES[name]
    model = _save_reference(tmp_path / "in", config)
    read, params = load_hf(tmp_path / "in")
    save_hf(tmp_path / "out", read, params)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    tokens = tiny_tokens(batch=1)
    expected = reference_logits(model, tokens)
    np.testing.assert_array_equal(reference_logits(again, tokens), expected)
    np.testing.assert_allclose(_logits(read, params, tokens), expected, atol=1e-5, rtol=0)
    header = st.read_header(tmp_path / "out" / "model.safetensors")
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "mixtral"])
def test_R20_shards_give_the_same_parameters(tmp_path, name):
    _save_reference(tmp_path / "one", FAMILIES[name], dtype="bfloat16")
    _save_reference(tmp_path / "many", FAMILIES[name], dtype="bfloat16", max_shard_size="9KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    one, many = load_hf(tmp_path / "one"), load_hf(tmp_path / "many")
    assert one[0] == many[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], many[1])


def test_R19_export_in_shards(tmp_path, saved):
    config, params = load_hf(saved)
    total = sum(len(raw) for _, _, raw in _tensors(saved).values())
    files = save_hf(tmp_path / "out", config, params, max_shard_size=total // 3 + 4096)
    names = [path.name for path in files]
    assert names == sorted(
        [
            "config.json",
            "generation_config.json",
            *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
            "model.safetensors.index.json",
        ]
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(_tensors(saved))
    assert _tensors(tmp_path / "out") == _tensors(saved)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], params)


def test_R19_the_index_comes_last_and_a_crash_leaves_no_folder(tmp_path, saved, monkeypatch):
    config, params = load_hf(saved)
    written = []
    original = st.write_file

    def failing(path, *arguments, **options):
        written.append(sorted(file.name for file in path.parent.iterdir()))
        if len(written) == 3:
            raise OSError("No space left on device")
        original(path, *arguments, **options)

    monkeypatch.setattr(st, "write_file", failing)
    with pytest.raises(OSError, match="No space"):
        save_hf(tmp_path / "out", config, params, max_shard_size="50KB")
    assert all("model.safetensors.index.json" not in names for names in written)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_loads(tmp_path, saved, monkeypatch):
    """As `test_R19_…`, but no cleaning up happens: what is left must not pass for a model."""
    config, params = load_hf(saved)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
    monkeypatch.setattr(st, "_bytes_of", lambda array, spec: (_ for _ in ()).throw(OSError("kill")))
    with pytest.raises(OSError, match="kill"):
        save_hf(tmp_path / "out", config, params)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.tmp-")
    with pytest.raises(ValueError, match="bytes"):
        load_hf(left)


def test_existing_folders_are_not_overwritten_unasked(tmp_path, saved):
    config, params = load_hf(saved)
    save_hf(tmp_path / "out", config, params)
    changed = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(ValueError, match="not empty"):
        save_hf(tmp_path / "out", config, changed)
    assert _tensors(tmp_path / "out") == _tensors(saved)
    save_hf(tmp_path / "out", config, changed, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], changed)


def test_R17_transposed_leaves_are_written_in_c_order(tmp_path):
    config = tiny_config(hidden_size=48, intermediate_size=48, tie_word_embeddings=True)
    params = jax.tree.map(np.asarray, _params(config))
    kernel = params["layers"]["self_attn"]["o_proj"]["weight"]
    backing = np.ascontiguousarray(kernel.transpose(2, 0, 1))
    params["layers"]["self_attn"]["o_proj"]["weight"] = backing.transpose(1, 2, 0)
    assert not params["layers"]["self_attn"]["o_proj"]["weight"][0].flags.c_contiguous
    save_hf(tmp_path / "out", config, params)
    read = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        np.testing.assert_array_equal(read[name], kernel[layer])


def test_R7_biases_are_loaded_and_count(tmp_path):
    config = FAMILIES["llama-biases"]
    model = _save_reference(tmp_path / "in", config)
    read, params = load_hf(tmp_path / "in")
    biases = [path for path in tree.flatten(params) if path.endswith(".bias")]
    assert len(biases) == 7
    tokens = tiny_tokens(batch=1)
    for path in biases:
        leaves = tree.flatten(params)
        leaves[path] = jnp.zeros_like(leaves[path])
        without = _logits(read, tree.unflatten(leaves), tokens)
        difference = np.abs(np.asarray(without) - reference_logits(model, tokens)).max()
        # Adding one vector to all keys shifts a softmax's scores alike, so k_proj's moves least.
        assert difference > 1e-4, path
    for flag, count in (("attention_bias", 8), ("mlp_bias", 6)):
        _edit(tmp_path / "in", **{"attention_bias": True, "mlp_bias": True, flag: False})
        with pytest.raises(ValueError, match=rf"bias is unexpected \({flag} is false") as error:
            load_hf(tmp_path / "in")
        assert str(error.value).count("is unexpected") == count


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_R8_declared_dtype(folder, key, caplog):
    fields = {"dtype": None, "torch_dtype": None, key: "bfloat16"}
    _edit(folder, **fields)
    with caplog.at_level(logging.WARNING):
        config, params = load_hf(folder)
    assert config.dtype == "bfloat16" and params["norm"]["weight"].dtype == jnp.bfloat16
    assert "rounded to bfloat16" in caplog.text
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    expected = torch.from_numpy(stored["lm_head.weight"]).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(
        np.asarray(params["lm_head"]["weight"]).astype(np.float32), expected
    )


def test_R8_undeclared_dtype_is_the_stored_one(folder, tmp_path):
    def mix(arrays):
        for name in arrays:
            if "norm" not in name:
                arrays[name] = arrays[name].astype(ml_dtypes.bfloat16)

    _edit(folder, dtype=None)
    _rewrite(folder, mix)
    config, params = load_hf(folder)
    assert config.dtype == "bfloat16"
    assert params["norm"]["weight"].dtype == jnp.float32
    assert params["lm_head"]["weight"].dtype == jnp.bfloat16
    save_hf(tmp_path / "out", config, params)
    assert _tensors(tmp_path / "out") == _tensors(folder)
    assert load_hf(tmp_path / "out")[1]["norm"]["weight"].dtype == jnp.float32
    assert load_hf(folder, dtype="float32")[1]["lm_head"]["weight"].dtype == jnp.float32
    # An argument decides over everything, and over layers that differ among themselves.
    _rewrite(folder, lambda a: a.update({_Q1: a[_Q1].astype(np.float32)}))
    with pytest.raises(ValueError, match=r"q_proj.weight are stored in different dtypes"):
        load_hf(folder)
    assert load_hf(folder, dtype=jnp.bfloat16)[0].dtype == "bfloat16"


_HEAD = "lm_head.weight"
_Q1 = "model.layers.1.self_attn.q_proj.weight"
_O1 = "model.layers.1.self_attn.o_proj.weight"


def test_wider_and_foreign_types(folder):
    _edit(folder, dtype=None)
    _rewrite(folder, lambda a: a.update({n: x.astype(np.float64) for n, x in a.items()}))
    with pytest.raises(ValueError, match="stored as float64; say which dtype"):
        load_hf(folder)
    assert load_hf(folder, dtype="float32")[1]["norm"]["weight"].dtype == jnp.float32
    _rewrite(folder, lambda a: a.update({_Q1: a[_Q1].astype(np.int8)}))
    with pytest.raises(ValueError, match=f"{_Q1} is int8"):
        load_hf(folder, dtype="float32")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_hf(folder, dtype="int8")


def test_values_too_large_for_float16_are_an_error_not_infinity(folder, tmp_path):
    _rewrite(folder, lambda a: a[_Q1].__setitem__((0, 0), 1e6))
    with pytest.raises(ValueError, match=rf"{_Q1}.*1000000.*float16 cannot hold"):
        load_hf(folder, dtype="float16")
    config, params = load_hf(folder)
    with pytest.raises(ValueError, match=rf"'{_Q1}' .*float16 cannot hold"):
        save_hf(tmp_path / "out", config, params, dtype="float16")
    quantized = quantize(config, params, scheme="int8")
    with pytest.raises(ValueError, match=rf"'{_Q1}' .*float16 cannot hold"):
        save_hf(tmp_path / "out", config, quantized, dtype="float16", merge=True)
    _rewrite(folder, lambda a: a[_Q1].__setitem__((0, 0), np.inf))  # what is infinite stays so
    assert np.isinf(
        load_hf(folder, dtype="float16")[1]["layers"]["self_attn"]["q_proj"]["weight"][1, 0, 0]
    )


def test_R11_tied_weights_are_one_array(tmp_path):
    _save_reference(tmp_path / "in", FAMILIES["llama-tied"])
    assert "lm_head.weight" not in _tensors(tmp_path / "in")
    config, params = load_hf(tmp_path / "in")
    assert config.tie_word_embeddings and "lm_head" not in params
    save_hf(tmp_path / "out", config, params)
    assert "lm_head.weight" not in _tensors(tmp_path / "out")


def test_R12_a_stored_head_of_a_tied_model(tmp_path):
    folder = tmp_path / "in"
    _save_reference(folder, FAMILIES["llama-tied"])
    _rewrite(folder, lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"].copy()}))
    config, params = load_hf(folder)
    assert config.tie_word_embeddings and "lm_head" not in params
    # Stored in another dtype it is compared by value, and rounding alone makes it another head.
    _rewrite(folder, lambda a: a.update({_HEAD: a[_HEAD].astype(np.float64)}))
    assert "lm_head" not in load_hf(folder)[1]
    _rewrite(folder, lambda a: a.update({_HEAD: a[_HEAD].astype(np.float16)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_hf(folder)
    _rewrite(folder, lambda a: a.update({_HEAD: a["model.embed_tokens.weight"].copy()}))
    _rewrite(folder, lambda a: a["lm_head.weight"].__setitem__((127, 63), 9.0))
    with pytest.raises(ValueError, match=r"tie_word_embeddings.*lm_head\.weight differs"):
        load_hf(folder)
    _edit(folder, tie_word_embeddings=False)
    assert load_hf(folder)[1]["lm_head"]["weight"][127, 63] == 9.0
    _edit(folder, tie_word_embeddings=True)
    _rewrite(folder, lambda a: a.update({"lm_head.weight": a["lm_head.weight"][:-1].copy()}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[127, 64\]"):
        load_hf(folder)


def test_R13_an_untied_model_needs_its_head(folder):
    _rewrite(folder, lambda a: a.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        load_hf(folder)


def test_R14_stored_rotary_frequencies_are_computed_instead(folder, saved):
    def add(arrays):
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            arrays[name] = np.zeros(8, np.float32)  # wrong on purpose

    _rewrite(folder, add)
    config, params = load_hf(folder)
    expected_config, expected = load_hf(saved)
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    _rewrite(folder, lambda a: a.update({"model.layers.0.rotary_emb.other": np.zeros(1)}))
    with pytest.raises(ValueError, match=r"rotary_emb\.other is unexpected"):
        load_hf(folder)


def test_errors_are_gathered_and_raised_once(folder):
    def damage(arrays):
        del arrays[_Q1], arrays["model.norm.weight"]
        arrays[_O1] = arrays[_O1][:-1].copy()
        arrays["model.layers.2.input_layernorm.weight"] = np.ones(64, np.float32)
        arrays["score.weight"] = np.ones(2, np.float32)

    _rewrite(folder, damage)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_hf(folder)
    for words in (
        f"{_Q1} is missing",
        "model.norm.weight is missing",
        f"{_O1} has shape [63, 64], expected [64, 64]",
        "model.layers.2.input_layernorm.weight is unexpected (num_hidden_layers is 2)",
        "score.weight is unexpected",
        str(folder),
    ):
        assert words in str(error.value)


def test_R10_counts_that_no_file_holds_are_refused_at_once(tmp_path):
    _save_reference(tmp_path / "in", FAMILIES["mixtral"])
    _edit(tmp_path / "in", num_hidden_layers=10_000, num_local_experts=100_000)
    begin = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"3000\d+ tensors \(num_hidden_layers is 10000.*files hold"
    ):
        load_hf(tmp_path / "in")
    assert time.perf_counter() - begin < 1


@pytest.fixture
def no_allocation(monkeypatch):
    """Fails the test if any weight is given memory."""
    from llama_jax.formats import streaming

    def refuse(*arguments):
        raise AssertionError("a weight was allocated")

    monkeypatch.setattr(streaming, "place", refuse)


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    _save_reference(folder, FAMILIES["llama-gqa"], max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.usefixtures("no_allocation")
def test_R15_a_missing_shard_is_named_before_allocating(sharded):
    second = next(sharded.glob("model-00002*"))
    second.unlink()
    with pytest.raises(ValueError, match=second.name):
        load_hf(sharded)


@pytest.mark.usefixtures("no_allocation")
def test_R16_a_cut_shard_is_named_before_allocating(sharded):
    second = next(sharded.glob("model-00002*"))
    second.write_bytes(second.read_bytes()[:-1024])
    with pytest.raises(ValueError, match=second.name):
        load_hf(sharded)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({_Q1: m["lm_head.weight"]}), f"{_Q1} should be in"),
        (lambda m: m.pop(_Q1), f"{_Q1} is in"),
        (lambda m: m.update({"extra": m[_Q1]}), "extra should be in"),
        (lambda m: m.update({_Q1: "../outside.safetensors"}), "plain name"),
        (lambda m: m.update({_Q1: "/etc/passwd"}), "plain name"),
        (lambda m: m.update({_Q1: "pytorch_model.bin"}), "plain name"),
        (lambda m: m.update({_Q1: 3}), "plain name"),
        (lambda m: m.clear(), "weight_map"),
    ],
)
def test_an_index_that_does_not_tell_the_truth(sharded, change, words):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = set(index["weight_map"].values())
    head, query = index["weight_map"]["lm_head.weight"], index["weight_map"][_Q1]
    assert len(names) > 2 and head != query
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        load_hf(sharded)


def test_what_is_no_model_folder(tmp_path, folder, sharded):
    with pytest.raises(ValueError, match="is not a folder"):
        load_hf(tmp_path / "nothing")
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="shards without their index"):
        load_hf(sharded)
    shutil.copy(folder / "model.safetensors", sharded)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="holds both"):
        load_hf(sharded)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        load_hf(folder)


class _Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "pytorch_model-00001-of-2.bin"]
)
def test_R110_pickles_are_never_opened(folder, tmp_path, name):
    marker = tmp_path / "marker"
    torch.save({"model.norm.weight": _Marker(marker)}, folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{name}.*convert"):
        load_hf(folder)
    assert not marker.exists()


def test_R111_R112_other_files_in_the_folder_are_left_alone(folder, saved, tmp_path):
    marker = tmp_path / "marker"
    for name in (
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "scheduler.pt",
        "adapter_model.bin",
        "pytorch_model.bin",
        "tokenizer.pkl",
    ):
        torch.save(_Marker(marker), folder / name)
    np.save(folder / "array.npy", np.array([_Marker(marker)], object), allow_pickle=True)
    (folder / "modeling_x.py").write_text(f"open({str(marker)!r}, 'w')")
    _edit(folder, auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    _, params = load_hf(folder)
    jax.tree.map(np.testing.assert_array_equal, params, load_hf(saved)[1])
    assert not marker.exists()


MESHES = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
    {"expert": 4, "fsdp": 2},
]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(sizes))
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases", "mixtral"])
def test_sharded_import_and_export(tmp_path, name, sizes):
    _save_reference(tmp_path / "in", FAMILIES[name], max_shard_size="50KB")
    mesh = make_mesh(sizes)
    config, params = load_hf(tmp_path / "in", mesh=mesh)
    expected = tree.flatten(shardings(config, params, mesh))
    plain = tree.flatten(load_hf(tmp_path / "in")[1])
    for path, leaf in tree.flatten(params).items():
        assert leaf.sharding == expected[path], path
        np.testing.assert_array_equal(leaf, plain[path])
    save_hf(tmp_path / "out", config, params, max_shard_size="50KB")
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "in")


def test_axes_that_do_not_divide_are_named(saved):
    with pytest.raises(ValueError, match="tensor of size 4 does not divide kv_heads = 2"):
        load_hf(saved, mesh=make_mesh({"tensor": 4, "fsdp": 2}))


def _adapted(config, params):
    rng = np.random.default_rng(0)
    leaves = tree.flatten(params)
    base = leaves["layers.self_attn.q_proj.weight"]
    layers, out, inner = base.shape
    leaves["layers.self_attn.q_proj.weight"] = LoraTensor(
        base=base,
        lora_a=jnp.asarray(rng.normal(size=(layers, 3, inner)), jnp.float32),
        lora_b=jnp.asarray(rng.normal(size=(layers, out, 3)), jnp.float32),
        scale=jnp.asarray([2.0, 0.5], jnp.float32),
        ranks=(3, 3),
    )
    return tree.unflatten(leaves)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
def test_adapters_are_written_only_when_merging(tmp_path, mesh):
    config = FAMILIES["llama-gqa"]
    params = _adapted(config, _params(config))
    if mesh:
        places = shardings(config, params, make_mesh(mesh))
        params = jax.device_put(params, places)
    with pytest.raises(ValueError, match=r"q_proj\.weight holds an adapter.*merge=True"):
        save_hf(tmp_path / "out", config, params)
    assert not (tmp_path / "out").exists()
    save_hf(tmp_path / "out", config, params, merge=True, dtype="float32")
    _, merged = load_hf(tmp_path / "out")
    leaf = params["layers"]["self_attn"]["q_proj"]["weight"]
    got = merged["layers"]["self_attn"]["q_proj"]["weight"]
    np.testing.assert_allclose(got, to_array(leaf), atol=1e-5, rtol=1e-5)
    assert np.abs(got - np.asarray(leaf.base)).max() > 0.1


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp8"])
def test_quantized_weights_are_written_only_when_merging(tmp_path, scheme):
    config = FAMILIES["llama-gqa"].replace(dtype="bfloat16")
    leaves = tree.flatten(_params(config))
    path = "layers.mlp.up_proj.weight"
    leaves[path] = quantize_array(leaves[path], scheme=scheme)
    params = tree.unflatten(leaves)
    with pytest.raises(ValueError, match=r"up_proj\.weight holds quantized weights.*merge=True"):
        save_hf(tmp_path / "out", config, params)
    save_hf(tmp_path / "out", config, params, merge=True)
    read, merged = load_hf(tmp_path / "out")
    assert read.dtype == "bfloat16"
    np.testing.assert_array_equal(
        merged["layers"]["mlp"]["up_proj"]["weight"], to_array(leaves[path], dtype=jnp.bfloat16)
    )


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "expert": 4}])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_every_kind_of_leaf_is_merged_tensor_by_tensor(tmp_path, scheme, mesh):
    """Quantized experts, an adapter on a quantized base, a weight trained whole."""
    config = FAMILIES["mixtral"]
    leaves = tree.flatten(_params(config))
    experts, query = "layers.block_sparse_moe.experts.w1.weight", "layers.self_attn.q_proj.weight"
    for path in (experts, query):
        leaves[path] = quantize_array(leaves[path], scheme=scheme)
    params = _adapted(config, tree.unflatten(leaves))
    params["norm"]["weight"] = SavedTensor(leaves["norm.weight"], leaves["norm.weight"] + 1)
    if mesh:
        params = jax.device_put(params, shardings(config, params, make_mesh(mesh)))
    with pytest.raises(ValueError, match="merge=True"):
        save_hf(tmp_path / "out", config, params)
    save_hf(tmp_path / "out", config, params, merge=True)
    merged = tree.flatten(load_hf(tmp_path / "out")[1])
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_allclose(merged[path], to_array(leaf), atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(merged["norm.weight"], leaves["norm.weight"] + 1)
    assert np.abs(merged[query] - to_array(leaves[query])).max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_export_in_another_dtype_rounds_to_nearest(tmp_path, saved, dtype):
    config, params = load_hf(saved)
    save_hf(tmp_path / "out", config, params, dtype=dtype)
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name, value in safetensors.torch.load_file(saved / "model.safetensors").items():
        assert torch.equal(written[name], value.to(DTYPES[dtype])), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("norm"), "norm.weight is missing"),
        (lambda p: p["norm"].update(bias=p["norm"]["weight"]), "norm.bias is unexpected"),
        (lambda p: p["norm"].update(weight=jnp.ones(3)), r"norm.weight has shape \(3,\)"),
        (lambda p: p["norm"].update(weight=jnp.ones(64, jnp.int32)), "norm.weight is int32"),
        (lambda p: p.update(layers=()), "stacked"),
    ],
)
def test_parameters_that_do_not_fit_are_not_written(tmp_path, saved, change, words):
    config, params = load_hf(saved)
    change(params)
    with pytest.raises(ValueError, match=words):
        save_hf(tmp_path / "out", config, params)
    assert not (tmp_path / "out").exists()


class _Tokenizer:
    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_tokenizer_and_generation_config_are_written(tmp_path, saved):
    config, params = load_hf(saved)
    config = config.replace(eos_token_id=(2, 5), pad_token_id=0)
    files = save_hf(tmp_path / "out", config, params, tokenizer=_Tokenizer())
    assert "tokenizer.json" in [path.name for path in files]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}


def test_every_tensor_is_written_once_per_table_row(tmp_path):
    for config in FAMILIES.values():
        names = [name for row in weight_table(config).values() for name, _ in row.hf_names()]
        assert len(names) == len(set(names))
