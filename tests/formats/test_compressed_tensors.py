"""compressed-tensors folders, read by transformers with that package."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llama_jax import cli, tree
from llama_jax.config import Compute
from llama_jax.formats.checkpoint import save_model
from llama_jax.formats.compressed_tensors import save_compressed
from llama_jax.formats.hf import load_hf
from llama_jax.formats.safetensors import SafetensorsFile
from llama_jax.model.transformer import forward
from llama_jax.weights.calibrate import calibrate
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import quantize
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.tensors import to_array
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

CONFIG = FAMILIES["llama-biases"]
TOKENS = tiny_tokens(2, 12)
FORMATS = {
    "int8": "pack-quantized",
    "int4": "pack-quantized",
    "fp8": "float-quantized",
    "int8-dynamic": "int-quantized",
    "int8-static": "int-quantized",
    "int4-dynamic": "pack-quantized",
    "int4-static": "pack-quantized",
    "fp8-dynamic": "float-quantized",
    "fp8-static": "float-quantized",
}


def quantized(scheme, config=CONFIG, **options):
    params = tiny_params(config)
    peaks = None
    if scheme.endswith("static"):
        # Wider ranges, so that no input lies beyond: the reader clamps at -128, not at -127.
        peaks = calibrate(config, params, TOKENS, compute=Compute())
        peaks = {path: 1.3 * peak for path, peak in peaks.items()}
    return quantize(config, params, scheme=scheme, peaks=peaks, **options)


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:You passed .quantization_config"
)
def test_its_own_reader_has_our_logits(tmp_path, scheme):
    # 96 is no multiple of int4's own tile.
    params = quantized(scheme, **({"tile": 32} if scheme in ("int4", "int8") else {}))
    files = save_compressed(tmp_path / "model", CONFIG, params)
    assert {file.name for file in files} >= {"config.json", "model.safetensors"}
    described = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["format"]) == (
        "compressed-tensors",
        FORMATS[scheme],
    )

    def error(params, **options):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32, **options
        )
        with torch.no_grad():
            theirs = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
        ours = np.asarray(forward(CONFIG, params, jnp.asarray(TOKENS)))
        return np.linalg.norm(theirs - ours) / np.linalg.norm(ours)

    # Scales of tokens are made by the reader, of int8 from 127.5: other roundings, but of the same
    # size.
    limit = 2e-2 if scheme.endswith("dynamic") else 1e-3
    assert error(params) < (1e-5 if scheme.startswith("fp8") else limit)
    full = tree.map_with_path(
        lambda _, leaf: to_array(leaf) if is_quantized(leaf) else leaf, params
    )
    assert error(full, quantization_config=CompressedTensorsConfig(dequantize=True)) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_packed_as_the_package_packs_them(tmp_path, bits):
    config = tiny_config(hidden_size=60, intermediate_size=90)
    params = quantized(f"int{bits}", config, tile=30 if bits == 4 else None, skip=["!mlp"])
    save_compressed(tmp_path / "model", config, params)
    file = SafetensorsFile(tmp_path / "model/model.safetensors")
    name = "model.layers.1.mlp.down_proj"

    def read(part):
        info = file.header.tensors[f"{name}.{part}"]
        out = np.empty(info.shape, info.dtype)
        file.copy_to(out, f"{name}.{part}", tuple(slice(0, n) for n in info.shape))
        return torch.from_numpy(out)

    shape = torch.Size(read("weight_shape").tolist())
    codes = unpack_from_int32(read("weight_packed"), bits, shape).numpy().astype(np.float32)
    scale = np.repeat(read("weight_scale").numpy(), 90 // read("weight_scale").shape[1], axis=1)
    expected = to_array(params["layers"]["mlp"]["down_proj"]["weight"])[1]
    np.testing.assert_allclose(codes * scale, expected, rtol=1e-6)


def test_what_is_left_alone_is_named(tmp_path):
    params = quantized("int8-dynamic", skip=["role:embedding", "lm_head", "k_proj"])
    save_compressed(tmp_path / "model", CONFIG, params)
    described = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    names = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    assert described["ignore"] == ["lm_head", *names]
    _, loaded = load_hf(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)


def test_what_has_no_place_there_is_refused(tmp_path):
    def refused(params, message, config=CONFIG):
        with pytest.raises(ValueError, match=message):
            save_compressed(tmp_path / "model", config, params)
        assert not (tmp_path / "model").exists()

    refused(tiny_params(CONFIG), "no weight is quantized")
    refused(quantized("nf4"), "nf4 values, which compressed-tensors does not have")
    refused(quantized("int4"), "tiles of 64 do not divide")
    refused(quantized("int8", skip=()), r"embed_tokens.weight is quantized")
    mixtral = FAMILIES["mixtral"]
    refused(quantized("int8", mixtral), "no experts as linear layers", mixtral)
    some = quantized("int8", skip=["!mlp"])
    others = tree.flatten(quantized("int8-dynamic"))
    mixed = tree.map_with_path(
        lambda path, leaf: leaf if is_quantized(leaf) else others[path], some
    )
    refused(mixed, "quantized in different ways")
    adapters = LoraConfig(r=2, lora_alpha=2, target_modules=("q_proj",))
    adapted = add_lora(
        CONFIG, quantized("int8"), adapters, jax.random.key(0), param_dtype="float32"
    )
    refused(adapted, "holds an adapter")


def test_the_command_writes_a_quantized_model(tmp_path, capsys):
    params = quantized("int8-dynamic")
    save_model(tmp_path / "q", CONFIG, params, None)
    out = tmp_path / "out"
    arguments = ["export", str(tmp_path / "q"), str(out), "--format", "compressed-tensors"]
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert str(out / "model.safetensors") in report["files"]
    assert cli.main([*arguments, "--overwrite", "--dtype", "float32"]) == 2
    assert "does not read --dtype" in capsys.readouterr().err
