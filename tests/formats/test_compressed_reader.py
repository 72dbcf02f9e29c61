"""compressed-tensors folders read: those of our writer, and those that the package itself makes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file

from llama_jax import cli, tree
from llama_jax.config import Compute, MoeConfig
from llama_jax.formats.checkpoint import load_model, save_model
from llama_jax.formats.compressed_config import stored_weights
from llama_jax.formats.compressed_tensors import save_compressed
from llama_jax.formats.hf import load_hf, save_hf
from llama_jax.formats.hf_config import to_hf
from llama_jax.load import load, load_abstract
from llama_jax.mesh.sharding import make_mesh
from llama_jax.model.transformer import forward
from llama_jax.weights.calibrate import calibrate
from llama_jax.weights.quantize import Quantization, quantize
from llama_jax.weights.quantized import Float8Tensor, IntegerTensor, PackedTensor, is_quantized
from llama_jax.weights.table import weight_table
from llama_jax.weights.tensors import to_array
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

CONFIG = FAMILIES["llama-biases"]
TOKENS = tiny_tokens(2, 12)
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
W8 = {"num_bits": 8, "strategy": "channel"}
W4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float"}


def quantized(scheme, config=CONFIG, **options):
    params = tiny_params(config)
    if scheme.endswith("static"):
        options["peaks"] = calibrate(config, params, TOKENS, compute=Compute())
    return quantize(config, params, scheme=scheme, **options)


def same_bits(left, right):
    """Whether two trees hold the same numbers; scales of files are float32."""
    left, right = tree.flatten_arrays(left), tree.flatten_arrays(right)
    assert list(left) == list(right)
    return all(np.array_equal(np.asarray(left[k]), np.asarray(right[k])) for k in left)


def logits(config, params):
    return np.asarray(forward(config, params, jnp.asarray(TOKENS)))


def written(folder, scheme="int8-dynamic", config=CONFIG, **options):
    """(parameters, folder) of a model that our writer has written."""
    params = quantized(scheme, config, **options)
    save_compressed(folder, config, params)
    return params, folder


def edit_config(folder, change):
    path = folder / "config.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def foreign(folder, weights, inputs=None, *, format, config=CONFIG, dtype=torch.bfloat16):
    """Writes a folder with the package's own compressors; returns what they make of it, by name."""
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format=format
    )
    compressor = BaseCompressor.get_value_from_registry(format)
    tensors, expected = {}, {}
    leaves = tree.flatten(tiny_params(config))
    for path, row in weight_table(config).items():
        for name, at in row.hf_names():
            weight = torch.from_numpy(np.array(leaves[path][at])).to(dtype)
            if row.role != "matrix":
                tensors[name] = weight
                continue
            state = {"weight": weight, "weight_scale": scale_of(weight, scheme.weights)}
            if inputs is not None and not inputs["dynamic"]:
                state["input_scale"] = torch.tensor([0.05], dtype=dtype)
            held = compressor.compress(state, scheme)
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": value for part, value in held.items()}
            expected[name] = compressor.decompress(held, scheme)["weight"].float().numpy()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=format,
        ignore=["lm_head", "re:.*block_sparse_moe.gate"],
        quantization_status="compressed",
    ).model_dump(mode="json")
    stored = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "float32")
    described = to_hf(config.replace(dtype=stored)) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(described))
    return expected


def scale_of(weight, arguments):
    largest = 448.0 if arguments.type == "float" else 2 ** (arguments.num_bits - 1) - 0.5
    if arguments.strategy == "tensor":
        return (weight.abs().max() / largest).reshape(1)
    if arguments.strategy == "channel":
        return weight.abs().amax(1, keepdim=True) / largest
    return weight.unflatten(1, (-1, arguments.group_size)).abs().amax(2) / largest


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int8", {}),
        ("int8", {"tile": 32}),
        ("int4", {"tile": 32}),
        ("fp8", {}),
        ("fp8", {"tile": 16}),
        ("fp8-dynamic", {}),
        ("fp8-dynamic", {"tile": 16}),
        ("fp8-static", {}),
        ("int8-dynamic", {}),
        ("int8-static", {}),
        ("int4-dynamic", {}),
        ("int4-static", {}),
        ("int8-dynamic", {"skip": ["role:embedding"]}),
    ],
)
def test_what_was_written_is_read_back(tmp_path, scheme, options):
    params, folder = written(tmp_path / "a", scheme, **options)
    loaded = load(folder)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    assert same_bits(loaded.params, params)
    np.testing.assert_array_equal(logits(CONFIG, loaded.params), logits(CONFIG, params))
    save_compressed(tmp_path / "b", loaded.config, loaded.params)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
    abstract = load_abstract(folder)
    assert abstract.config == loaded.config
    assert abstract.params == jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded.params
    )


def test_a_tied_head_has_no_matrix_of_its_own(tmp_path):
    params, folder = written(tmp_path / "a", "int8", FAMILIES["llama-tied"])
    assert same_bits(load(folder).params, params)
    edit_config(folder, at_group("targets", ["lm_head"]))
    with pytest.raises(ValueError, match="targets has 'lm_head', which names no matrix"):
        load(folder)


@pytest.mark.parametrize("tile", [91, 7])
def test_odd_rows_of_four_bits_end_in_a_whole_byte(tmp_path, tile):
    config = tiny_config(intermediate_size=91)
    params, folder = written(tmp_path / "a", "int4", config, tile=tile, skip=["!mlp.down_proj"])
    assert same_bits(load(folder).params, params)


def test_parts_of_a_matrix_may_lie_in_several_files(tmp_path):
    params = quantized("int8-static")
    files = save_compressed(tmp_path / "a", CONFIG, params, max_shard_size="3KB")
    assert sum(file.suffix == ".safetensors" for file in files) > 20
    assert same_bits(load(tmp_path / "a").params, params)


CASES = {
    "W8A8": ("int-quantized", W8, TOKEN),
    "W8A8-static": ("int-quantized", TENSOR, TENSOR),
    "W8A16-plain": ("int-quantized", W8, None),
    "W8A16": ("pack-quantized", W8, None),
    "W8A16-group": ("pack-quantized", {**W4, "num_bits": 8, "actorder": "weight"}, None),
    "W4A16": ("pack-quantized", {**W4, "observer": "mse"}, None),
    "W4A16-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, None),
    "W4A8": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, TOKEN),
    "FP8": ("float-quantized", {**FP8, "strategy": "tensor"}, {**FP8, **TENSOR}),
    "FP8-dynamic": ("float-quantized", {**FP8, "strategy": "channel"}, {**FP8, **TOKEN}),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)),
        *((case, torch.float16) for case in ("W8A8", "W4A16", "FP8")),
    ],
    ids=str,
)
def test_weights_are_those_that_the_package_makes(tmp_path, case, dtype):
    format, weights, inputs = CASES[case]
    expected = foreign(tmp_path / "model", weights, inputs, format=format, dtype=dtype)
    config, params = load_hf(tmp_path / "model")
    leaves = tree.flatten(params)
    found = {
        name: to_array(leaves[path])[at]
        for path, row in weight_table(config).items()
        for name, at in row.hf_names()
        if is_quantized(leaves[path])
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        # The package multiplies in the dtype of the scale.
        ours = torch.from_numpy(np.array(found[name])).to(dtype).float().numpy()
        np.testing.assert_array_equal(ours, value, err_msg=name)
    leaf = leaves["layers.mlp.up_proj.weight"]
    if case in ("W8A8", "W4A8", "FP8-dynamic"):
        kind = Float8Tensor if case.startswith("FP8") else IntegerTensor
        assert isinstance(leaf, kind) and leaf.activation_scale is None
    elif case in ("W8A8-static", "FP8"):
        scale = np.float32(torch.tensor(0.05, dtype=dtype).float())
        np.testing.assert_array_equal(leaf.activation_scale, [scale] * 2)
    else:
        assert isinstance(leaf, PackedTensor) == case.startswith("W4")
    plain = {str(leaf.dtype) for leaf in leaves.values() if not is_quantized(leaf)}
    assert plain == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize(
    ("shape", "strategy"), [([], "tensor"), ([1], "tensor"), ([-1], "channel")]
)
def test_scales_have_several_shapes(tmp_path, shape, strategy):
    params, folder = written(tmp_path / "a")

    def change(tensors):
        for name, scale in list(tensors.items()):
            if name.endswith("weight_scale"):
                scale = scale if strategy == "channel" else scale.max()
                tensors[name] = scale.reshape(shape).clone()

    edit_tensors(folder, change)
    group = {"strategy": strategy, "group_size": None}
    edit_config(folder, lambda c: groups(c)["group_0"]["weights"].update(group))
    _, loaded = load_hf(folder)
    wanted, found = (
        np.asarray(each["layers"]["mlp"]["up_proj"]["weight"].base.scale)
        for each in (params, loaded)
    )
    if strategy == "tensor":
        wanted = np.broadcast_to(wanted.max(axis=1, keepdims=True), wanted.shape)
    np.testing.assert_array_equal(found, wanted)


def groups(described):
    return described["quantization_config"]["config_groups"]


@pytest.mark.parametrize("scheme", ["int4", "int8-static", "fp8"])
def test_on_a_mesh_it_is_the_same(tmp_path, scheme):
    params, folder = written(tmp_path / "a", scheme, **({"tile": 16} if scheme == "int4" else {}))
    mesh = make_mesh({"tensor": 2}, devices=jax.devices()[:2])
    config, loaded = load_hf(folder, mesh=mesh)
    assert same_bits(loaded, params)
    leaf = loaded["layers"]["mlp"]["down_proj"]["weight"]
    codes = tree.flatten_arrays(leaf)[
        {"int4": "packed", "fp8": "qvalue"}.get(scheme, "base.qvalue")
    ]
    assert codes.addressable_shards[0].data.shape[-1] == codes.shape[-1] // 2
    with jax.set_mesh(mesh):
        found = logits(config, loaded)
    np.testing.assert_allclose(found, logits(config, params), rtol=2e-5, atol=2e-5)


def test_groups_may_say_different_things_of_different_weights(tmp_path):
    eight = quantized("int8", tile=32)
    four = tree.flatten(quantized("int4", tile=32))
    _, folder = written(tmp_path / "a", "int8", tile=32)
    save_compressed(tmp_path / "b", CONFIG, tree.unflatten(four))
    parts = load_file(tmp_path / "b/model.safetensors")
    edit_tensors(folder, lambda t: t.update({k: v for k, v in parts.items() if "up_proj" in k}))
    other = json.loads((tmp_path / "b/config.json").read_text())

    def change(described):
        groups(described)["group_1"] = {
            **groups(other)["group_0"],
            "targets": ["re:.*up_proj$", "model.layers.0.mlp.up_proj"],
        }
        groups(described)["group_2"] = groups(described)["group_0"]  # the same once more
        described["quantization_config"]["ignore"] = ["re:lm.head"]

    edit_config(folder, change)
    _, loaded = load_hf(folder)
    mixed = tree.map_with_path(
        lambda path, leaf: four[path] if path.endswith("up_proj.weight") else leaf, eight
    )
    assert same_bits(loaded, mixed)


def at_group(field, value):
    return lambda c: groups(c)["group_0"].update({field: value})


def at_weights(**values):
    return lambda c: groups(c)["group_0"]["weights"].update(values)


def at_inputs(**values):
    return lambda c: groups(c)["group_0"]["input_activations"].update(values)


def at_top(**values):
    return lambda c: c["quantization_config"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at_top(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme = .* only null"),
        (at_top(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .*format dense"),
        (at_top(transform_config={"config_groups": {"u": {}}}), "transform_config .*not supported"),
        (at_top(quantization_status="initialized"), 'status .* only null or "compressed" or "fro'),
        (at_top(rotation="hadamard"), 'rotation = "hadamard" is unknown; known are config_groups'),
        (at_top(config_groups={}), "config_groups is {}; it must map"),
        (at_top(config_groups={"W8A8": ["Linear"]}), "config_groups.W8A8 is"),
        (at_top(ignore="lm_head"), "ignore is .*must be a list"),
        (at_top(ignore=["re:("]), "ignore has 're:.*which is no pattern"),
        (at_group("format", "marlin-24"), 'format "marlin-24", supported are int-quantized'),
        (at_weights(type="float"), "int of 8 bits by token.*beside.*float of 8 bits by channel"),
        (at_group("output_activations", TENSOR), "output_activations is not supported, only null"),
        (at_group("targets", ["Embedding"]), "targets has 'Embedding', which names no matrix"),
        (at_group("targets", ["re:.*attn$"]), "targets has 're:.*attn.', which names no matrix"),
        (at_group("weights", None), "weights is missing"),
        (at_group("scales", 1), "config_groups.group_0.scales = 1 is unknown"),
        (at_weights(symmetric=False), "weights.symmetric is false.*weight_zero_point.* are not"),
        (
            lambda c: (at_group("format", "pack-quantized")(c), at_weights(type="float")(c)),
            "float of 8 bits by channel. is not supported in format pack-quantized",
        ),
        (at_weights(num_bits=4), "int of 4 bits by channel.*not supported in format int-quantized"),
        (at_weights(num_bits=2), "weights.num_bits is 2, supported are 8, 4"),
        (at_weights(num_bits=True), "weights.num_bits is true, supported"),
        (at_weights(type="nf4"), 'weights.type is "nf4", supported are "int", "float"'),
        (at_weights(strategy="block", block_structure=[4, 4]), "block_structure is .4, 4."),
        (at_weights(strategy="tensor_group"), 'weights.strategy is "tensor_group", supported are'),
        (at_weights(strategy="group"), "group_size is null; strategy group needs"),
        (at_weights(strategy="group", group_size=0), "group_size is 0; strategy group needs"),
        (at_weights(strategy="group", group_size=[8]), "group_size is .8.; it must be a positive"),
        (at_weights(strategy="group", group_size=32), "int of 8 bits by token.*beside.*by group"),
        (at_weights(actorder="group"), 'weights.actorder is "group".*weight_g_idx'),
        (at_weights(dynamic=True), "weights .*dynamic. is not supported"),
        (at_weights(precision=1), "group_0.weights.precision = 1 is unknown"),
        (at_inputs(symmetric=False), "input_activations.symmetric is false.*input_zero_point"),
        (at_inputs(strategy="tensor"), "int of 8 bits by tensor, dynamic. is not supported beside"),
        (at_inputs(dynamic="local"), 'input_activations.dynamic is "local", supported are true'),
        (at_inputs(num_bits=4), "int of 4 bits by token.*not supported beside.*supported are"),
        (at_inputs(type="float"), "float of 8 bits by token.*not supported beside"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    _, folder = written(tmp_path / "a")
    edit_config(folder, change)
    for read in (load, load_abstract):
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            at_top(ignore=["lm_head", "model.layers.1.mlp.up_proj"]),
            "0.mlp.up_proj and model.layers",
        ),
        (at_top(ignore=["re:.*"]), "weight_scale is unexpected|int8, allowed are float32"),
        (at_top(ignore=[]), "lm_head.weight_scale is missing.*lm_head.weight is float32"),
        (
            lambda c: groups(c).update(
                other={**groups(c)["group_0"], "input_activations": None, "targets": ["Linear"]}
            ),
            "config_groups group_0 and other say different things of model.layers.0",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path, change, message):
    _, folder = written(tmp_path / "a")
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_config_cannot_ask_for_millions_of_names():
    many = FAMILIES["mixtral"].replace(
        num_hidden_layers=10_000, moe=MoeConfig(100_000, 2, router_aux_loss_coef=0.0)
    )
    group = {"targets": ["Linear"], "weights": W8, "format": "pack-quantized"}
    with pytest.raises(
        ValueError, match="would be 1000000000 matrices .num_hidden_layers is 10000"
    ):
        stored_weights({"config_groups": {"g": group}}, many)


def test_groups_must_divide_rows(tmp_path):
    _, folder = written(tmp_path / "a", "int4", tile=32)
    edit_config(folder, at_weights(group_size=64))
    with pytest.raises(ValueError, match="group_size 64 does not divide the 96 inputs of .*down"):
        load(folder)


UP = "model.layers.1.mlp.up_proj"


def put(name, value):
    return lambda tensors: tensors.update({f"{UP}.{name}": value})


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        ("int8-dynamic", lambda t: t.pop(f"{UP}.weight_scale"), "up_proj.weight_scale is missing"),
        ("int8-static", lambda t: t.pop(f"{UP}.input_scale"), "up_proj.input_scale is missing"),
        ("int4", lambda t: t.pop(f"{UP}.weight_shape"), "up_proj.weight_shape is missing"),
        (
            "int4",
            put("weight_zero_point", torch.zeros(12, 2, dtype=torch.int32)),
            "up_proj.weight_zero_point is unexpected .asymmetric weights are not supported",
        ),
        ("int8-dynamic", put("extra", torch.zeros(1)), "up_proj.extra is unexpected$"),
        (
            "int4",
            put("weight_shape", torch.tensor([96, 65])),
            r"up_proj.weight_shape says \[96, 65\], expected \[96, 64\]",
        ),
        (
            "int4",
            put("weight_packed", torch.zeros(96, 16, dtype=torch.int32)),
            r"up_proj.weight_packed has shape \[96, 16\], expected \[96, 8\]",
        ),
        (
            "int8-dynamic",
            put("weight_scale", torch.ones(96, 2)),
            r"up_proj.weight_scale has shape \[96, 2\], expected \[96, 1\] or \[96\]",
        ),
        (
            "int8-dynamic",
            put("weight_scale", torch.ones(96, 1, dtype=torch.float8_e4m3fn)),
            "up_proj.weight_scale is float8_e4m3fn, allowed are float32, bfloat16, float16",
        ),
        (
            "fp8",
            put("weight", torch.zeros(96, 64, dtype=torch.float8_e5m2)),
            "up_proj.weight is float8_e5m2, allowed are float8_e4m3fn",
        ),
        (
            "int8-dynamic",
            put("weight", torch.zeros(96, 64)),
            "up_proj.weight is float32, allowed are int8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_anything_is_loaded(
    tmp_path, monkeypatch, scheme, change, message
):
    _, folder = written(tmp_path / "a", scheme, **({"tile": 32} if scheme == "int4" else {}))
    edit_tensors(folder, change)
    monkeypatch.setattr("llama_jax.formats.streaming.place", None)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_it_is_refused_what_a_quantized_checkpoint_is_refused(tmp_path):
    params, folder = written(tmp_path / "a")
    save_model(tmp_path / "b", CONFIG, params, None)
    for source in (folder, tmp_path / "b"):
        with pytest.raises(
            ValueError, match=r"dtype bfloat16 cannot be chosen: layers.+ is quantized"
        ):
            load(source, dtype="bfloat16")
        with pytest.raises(ValueError, match="is quantized already"):
            load(source, quantization=Quantization("int8"))
        with pytest.raises(ValueError, match="quantized weights.*pass merge=True"):
            save_hf(tmp_path / "c", CONFIG, load(source).params)
        save_hf(tmp_path / source.name / "full", CONFIG, load(source).params, merge=True)
    full = [(tmp_path / name / "full/model.safetensors").read_bytes() for name in "ab"]
    assert full[0] == full[1]
    # What is not quantized yet may be, and has the dtype that is asked for.
    head = Quantization("int8", skip=("!lm_head",))
    for source in (folder, tmp_path / "b"):
        loaded = load(source, quantization=head, dtype="bfloat16")
        assert is_quantized(loaded.params["lm_head"]["weight"])
        assert loaded.params["norm"]["weight"].dtype == jnp.bfloat16
        assert same_bits(loaded.params["layers"]["mlp"]["up_proj"]["weight"], up(params))


def up(params):
    return params["layers"]["mlp"]["up_proj"]["weight"]


@pytest.mark.parametrize("scheme", ["int8-static", "int4"])
def test_convert_writes_it_as_it_is_piece_by_piece(tmp_path, monkeypatch, scheme):
    monkeypatch.setattr("llama_jax.formats.streaming._PIECE_BYTES", 4 * 64 * 10)
    _, folder = written(tmp_path / "a", scheme, **({"tile": 32} if scheme == "int4" else {}))
    assert cli.main(["convert", str(folder), str(tmp_path / "b")]) == 0
    _, expected = load_hf(folder)
    _, found = load_model(tmp_path / "b")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert same_bits(found, expected)


def test_it_is_merged_as_the_full_matrices_it_stands_for(tmp_path):
    params, folder = written(tmp_path / "a")
    save_hf(tmp_path / "full", CONFIG, params, merge=True)
    for name, model in (("one", folder), ("two", tmp_path / "full")):
        recipe = {"method": "linear", "models": [{"model": str(model), "weight": 1.0}]}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        command = ["merge", str(tmp_path / f"{name}.yaml"), str(tmp_path / name)]
        assert cli.main(command) == 0
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert same[0] == same[1]


def test_experts_keep_their_inputs(tmp_path):
    config = FAMILIES["mixtral"]
    expected = foreign(tmp_path / "a", W4, format="pack-quantized", config=config)
    _, params = load_hf(tmp_path / "a")
    found = to_array(params["layers"]["block_sparse_moe"]["experts"]["w2"]["weight"])[1, 3]
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    np.testing.assert_array_equal(jnp.asarray(found, jnp.bfloat16), expected[name])
    assert np.isfinite(logits(config, params)).all()
    edit_config(
        tmp_path / "a",
        lambda c: groups(c)["group_0"].update(
            weights={"num_bits": 4, "strategy": "channel"}, input_activations=TOKEN
        ),
    )
    with pytest.raises(ValueError, match="input_activations of .*experts.* are rounded"):
        load_hf(tmp_path / "a")
