"""GGUF models in and out: round trips, transformers' own reader, sharded loading, refusals."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM

from llama_jax import tree
from llama_jax.config import RopeScaling
from llama_jax.formats.gguf import load_gguf, save_gguf
from llama_jax.formats.gguf_fields import Entry
from llama_jax.formats.gguf_reader import GGUFFile
from llama_jax.formats.gguf_writer import TensorPlan, write_gguf
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.model.transformer import forward
from llama_jax.weights.quantize import quantize
from llama_jax.weights.table import weight_table
from llama_jax.weights.tensors import to_array
from tests.reference import reference_config, reference_logits
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

SAVABLE = {name: config for name, config in FAMILIES.items() if name != "dynamic-rope"}
# Scalings that scale nothing, which GGUF has as none.
for family in ("linear-rope", "llama3-rope", "yarn-rope"):
    neutral = dataclasses.replace(FAMILIES[family].rope_scaling, factor=1.0)
    SAVABLE[f"{family}-1"] = FAMILIES[family].replace(rope_scaling=neutral)


def same_tree(a, b) -> bool:
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(
        a[path].dtype == b[path].dtype and np.array_equal(np.asarray(a[path]), np.asarray(b[path]))
        for path in a
    )


def rewrite(source, target, *, drop=(), add=(), change=lambda name, values: values):
    """Copies a file tensor by tensor in float32, without some of its tensors or with more."""
    file = GGUFFile(source)
    values = {}
    for name, tensor in file.tensors.items():
        if name in drop:
            continue
        rows, columns = int(np.prod(tensor.shape[:-1])), tensor.shape[-1]
        out = np.empty((rows, columns), np.float32)
        file.read(name, out, rows=slice(0, rows), columns=slice(0, columns))
        values |= change(name, {name: out.reshape(tensor.shape)})
    values |= {name: np.zeros(shape, np.float32) for name, shape in dict(add).items()}
    reader = gguf.GGUFReader(source)
    entries = []
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            kind = field.types[0]
            item = field.types[1] if len(field.types) > 1 else None
            entries.append(Entry(key, kind, field.contents(), item))
    plans = [TensorPlan(name, v.shape, GGMLQuantizationType.F32) for name, v in values.items()]
    write_gguf(target, entries, plans, lambda plan: values[plan.name])


@pytest.mark.parametrize("family", SAVABLE)
def test_float32_survives_bit_for_bit_and_the_config_is_equal(family, tmp_path):
    config = SAVABLE[family]
    params = tiny_params(config)
    path = save_gguf(tmp_path / "model.gguf", config, params, None)
    again, loaded, tokenizer = load_gguf(path)
    assert again == config
    assert tokenizer is None
    assert same_tree(loaded, params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_parameters_survive_float32_and_their_own_type(dtype, tmp_path):
    config = tiny_config(dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), tiny_params(config.replace(dtype="float32")))
    for kind in ("f32", {"float16": "f16", "bfloat16": "bf16"}[dtype]):
        path = save_gguf(tmp_path / f"{kind}.gguf", config, params, None, dtype=kind)
        again, loaded, _ = load_gguf(path)
        assert again == config
        assert same_tree(loaded, params)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_a_narrow_file_holds_what_the_gguf_package_encodes(kind, tmp_path):
    config = tiny_config()
    params = tiny_params(config)
    path = save_gguf(tmp_path / "model.gguf", config, params, None, dtype=kind)
    reader = gguf.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == kind.upper()
    outer = "Q8_0" if kind.startswith("q4") else kind.upper()
    assert kinds["token_embd.weight"] == kinds["output.weight"] == outer
    assert kinds["blk.1.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    stored = {tensor.name: tensor for tensor in reader.tensors}["blk.1.ffn_down.weight"]
    original = np.asarray(params["layers"]["mlp"]["down_proj"]["weight"][1])
    encoded = gguf.quants.quantize(original, stored.tensor_type)
    np.testing.assert_array_equal(stored.data.view(np.uint8), encoded.view(np.uint8))
    # In float32 nothing is rounded a second time.
    again, loaded, _ = load_gguf(path, dtype="float32")
    assert again == config
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(loaded["layers"]["mlp"]["down_proj"]["weight"][1], values)
    np.testing.assert_array_equal(loaded["norm"]["weight"], params["norm"]["weight"])


def test_the_dtype_follows_the_matrices_unless_a_norm_would_lose(tmp_path):
    config = tiny_config()
    params = tiny_params(config)
    path = save_gguf(tmp_path / "fine.gguf", config, params, None, dtype="bf16")
    assert load_gguf(path)[0].dtype == "float32"  # float32 norms
    params = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    path = save_gguf(tmp_path / "coarse.gguf", config, params, None, dtype="bf16")
    assert load_gguf(path)[0].dtype == "bfloat16"
    config, loaded, _ = load_gguf(path, dtype="float16")
    assert config.dtype == "float16"
    assert {leaf.dtype.name for leaf in tree.flatten(loaded).values()} == {"float16"}
    with pytest.raises(ValueError, match="int8"):
        load_gguf(path, dtype="int8")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama-mha", "f32"),
        ("llama-gqa", "f32"),
        ("llama-tied", "f32"),
        ("llama-head-dim", "f32"),
        ("llama-gqa", "f16"),
        ("llama-gqa", "bf16"),
        ("llama-tied", "q8_0"),
        ("llama-gqa", "q4_0"),
        ("llama-tied", "q4_1"),
    ],
)
def test_transformers_reads_the_file_to_the_same_logits(family, kind, tmp_path):
    config = FAMILIES[family]
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None, dtype=kind)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    _assert_same_logits(model, path)


@pytest.mark.parametrize("family", ["llama3-rope", "llama-biases", "linear-rope", "yarn-rope"])
def test_transformers_agrees_where_it_must_be_told_the_config(family, tmp_path):
    # Its reader takes neither biases nor rotary scaling from GGUF, so they come from outside.
    config = FAMILIES[family]
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=reference_config(config), dtype=torch.float32
    ).eval()
    if config.attention_bias:
        # It loads biases without reordering their rows, unlike llama.cpp; put ours in.
        _, params, _ = load_gguf(path)
        for layer, block in enumerate(model.model.layers):
            for name in ("q_proj", "k_proj"):
                bias = np.array(params["layers"]["self_attn"][name]["bias"][layer])
                getattr(block.self_attn, name).bias.data = torch.from_numpy(bias)
    _assert_same_logits(model, path)


def _assert_same_logits(model, path):
    config, params, _ = load_gguf(path, dtype="float32")
    tokens = tiny_tokens(length=20)
    ours = np.asarray(forward(config, params, tokens))
    np.testing.assert_allclose(ours, reference_logits(model, tokens), rtol=0, atol=1e-5)


def test_transformers_reads_the_same_config(tmp_path):
    config = FAMILIES["llama-gqa"]
    save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None, name="tiny")
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert getattr(theirs, name) == getattr(config, name), name
    assert np.float32(theirs.rms_norm_eps) == np.float32(config.rms_norm_eps)


def test_query_and_key_rows_change_order_and_others_do_not_r22_r23(tmp_path):
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2, head_dim=4, vocab_size=32)
    params = tiny_params(config)
    table = weight_table(config)

    def numbered(path: str) -> np.ndarray:
        shape = table[path].shape
        return np.broadcast_to(np.arange(shape[1], dtype=np.float32)[None, :, None], shape)

    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        params["layers"]["self_attn"][name]["weight"] = numbered(f"layers.self_attn.{name}.weight")
    path = save_gguf(tmp_path / "m.gguf", config, params, None)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert stored["blk.1.attn_k.weight"][:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert stored["blk.0.attn_q.weight"][:8, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert stored["blk.0.attn_v.weight"][:, 0].tolist() == list(range(8))
    assert stored["blk.0.attn_output.weight"][:5, 0].tolist() == list(range(5))
    assert same_tree(load_gguf(path)[1], params)


@pytest.mark.parametrize(
    ("family", "sizes", "kind"),
    [
        ("llama-gqa", {"fsdp": 4, "tensor": 2}, "q8_0"),
        ("llama-gqa", {"data": 8}, "f32"),
        ("llama-biases", {"fsdp": 4, "tensor": 2}, "f32"),
        ("mixtral", {"fsdp": 2, "expert": 2, "tensor": 2}, "q8_0"),
    ],
)
def test_each_device_gets_its_slice(family, sizes, kind, tmp_path):
    config = FAMILIES[family]
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None, dtype=kind)
    _, whole, _ = load_gguf(path)
    mesh = make_mesh(sizes)
    again, params, _ = load_gguf(path, mesh=mesh)
    assert again == config
    assert same_tree(params, whole)
    places = tree.flatten(shardings(config, params, mesh))
    assert all(leaf.sharding == places[path] for path, leaf in tree.flatten(params).items())


def test_sharded_parameters_are_written_like_whole_ones(tmp_path):
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    spread = jax.device_put(params, shardings(config, params, mesh))
    one = save_gguf(tmp_path / "one.gguf", config, params, None)
    other = save_gguf(tmp_path / "other.gguf", config, spread, None)
    assert one.read_bytes() == other.read_bytes()


def test_experts_in_the_older_layout_are_read(tmp_path):
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    path = save_gguf(tmp_path / "m.gguf", config, params, None)

    def split(name, values):
        if "_exps." not in name:
            return values
        return {
            name.replace("_exps.", f".{expert}."): matrix
            for expert, matrix in enumerate(values[name])
        }

    rewrite(path, tmp_path / "older.gguf", change=split)
    again, loaded, _ = load_gguf(tmp_path / "older.gguf")
    assert again == config
    assert same_tree(loaded, params)


def test_the_divisors_alone_give_back_llama3_scaling(tmp_path):
    config = FAMILIES["llama3-rope"]
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None)
    assert "llama_jax.config" not in GGUFFile(path).metadata
    assert load_gguf(path)[0].rope_scaling == config.rope_scaling
    rewrite(
        path,
        tmp_path / "bent.gguf",
        change=lambda name, v: {k: x + 0.5 if "rope" in k else x for k, x in v.items()},
    )
    with pytest.raises(ValueError, match=r"bent\.gguf.*rope_freqs\.weight"):
        load_gguf(tmp_path / "bent.gguf")


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(tmp_path):
    config = FAMILIES["llama-gqa"]
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None)
    broken = tmp_path / "broken.gguf"
    rewrite(
        path,
        broken,
        drop=("blk.1.attn_v.weight", "output_norm.weight"),
        add={"blk.0.attn_q_norm.weight": (16,)},
        change=lambda name, v: {
            k: x[:-1] if k == "blk.0.ffn_up.weight" else x for k, x in v.items()
        },
    )
    with pytest.raises(ValueError) as error:
        load_gguf(broken)
    message = str(error.value)
    assert str(broken) in message
    assert "missing tensors: blk.1.attn_v.weight, output_norm.weight" in message
    assert "unexpected tensors: blk.0.attn_q_norm.weight" in message
    assert "blk.0.ffn_up.weight has shape (95, 64), expected (96, 64)" in message


def test_an_absurd_block_count_is_refused_at_once_r118(tmp_path):
    config = FAMILIES["llama-gqa"]
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None)
    content = path.read_bytes()
    at = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    assert content[at : at + 4] == b"\2\0\0\0"
    for count in (100_000, 0, 3, 2**32 - 1):
        path.write_bytes(content[:at] + count.to_bytes(4, "little") + content[at + 4 :])
        with pytest.raises(ValueError, match=r"m\.gguf: llama\.block_count is \d+"):
            load_gguf(path)


def test_damaged_metadata_is_a_value_error_or_loads_r118(tmp_path):
    config = FAMILIES["llama3-rope"]
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None, dtype="f16")
    content = path.read_bytes()
    end = min(tensor.start for tensor in GGUFFile(path).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(4, end)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_gguf(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_a_crash_leaves_nothing_and_a_file_is_not_replaced_unasked(tmp_path, monkeypatch):
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    path = save_gguf(tmp_path / "m.gguf", config, params, None)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists"):
        save_gguf(path, config, params, None)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_jax.formats.gguf.hf_to_meta", fail)
    with pytest.raises(KeyboardInterrupt):
        save_gguf(path, config, params, None, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    save_gguf(path, config, params, None, dtype="f16", overwrite=True)
    assert len(path.read_bytes()) < len(before)
    assert path.stat().st_mode & 0o444 == 0o444


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="q4_k.*f32, f16, bf16, q8_0, q4_0, q4_1"):
        save_gguf(path, config, params, None, dtype="q4_k")
    with pytest.raises(ValueError, match=r"\.gguf"):
        save_gguf(tmp_path / "model", config, params, None)
    with pytest.raises(ValueError, match="is a folder"):
        (tmp_path / "folder.gguf").mkdir()
        save_gguf(tmp_path / "folder.gguf", config, params, None)
    dynamic = FAMILIES["dynamic-rope"]
    with pytest.raises(ValueError, match="dynamic"):
        save_gguf(path, dynamic, tiny_params(dynamic), None)
    yarn = RopeScaling(rope_type="yarn", factor=4.0, attention_factor=1.5)
    with pytest.raises(ValueError, match="attention_factor"):
        save_gguf(path, config.replace(rope_scaling=yarn), params, None)
    odd = tiny_config(intermediate_size=80)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down\.weight.*80.*q8_0"):
        save_gguf(path, odd, tiny_params(odd), None, dtype="q8_0")
    with pytest.raises(ValueError, match=r"norm\.weight is missing"):
        save_gguf(path, config, {k: v for k, v in params.items() if k != "norm"}, None)
    params["layers"]["mlp"]["up_proj"]["weight"] *= 1e9
    for kind in ("f16", "q8_0", "q4_0", "q4_1"):
        with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight"):
            save_gguf(path, config, params, None, dtype=kind)
    assert not path.exists()


def test_adapters_and_quantized_weights_are_merged_only_on_request(tmp_path):
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    quantized = quantize(config, params, scheme="int8")
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="quantized weights.*a GGUF file"):
        save_gguf(path, config, quantized, None)
    save_gguf(path, config, quantized, None, merge=True)
    _, loaded, _ = load_gguf(path)
    full = jax.tree.map(to_array, quantized, is_leaf=lambda x: not isinstance(x, dict))
    assert same_tree(loaded, full)
    assert not same_tree(loaded, params)


def test_a_window_is_kept_with_a_word_of_warning(tmp_path, caplog):
    config = FAMILIES["mistral"]
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), None)
    assert "sliding_window 8" in caplog.text
    assert load_gguf(path)[0].sliding_window == 8
