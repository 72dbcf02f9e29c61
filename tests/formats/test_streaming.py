"""Weights that are quantized on their way in equal those quantized afterwards, and no more than a
layer of one weight is ever whole."""

import json

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.formats import streaming
from llama_jax.formats.checkpoint import save_model
from llama_jax.formats.gguf import save_gguf
from llama_jax.formats.hf import save_hf
from llama_jax.load import load
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.weights.quantize import Quantization, quantize
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.table import weight_table
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly

HOW = Quantization("nf4", tile=16, double=True)


def stored(kind, family, folder):
    config = FAMILIES[family]
    params = tiny_params(config)
    path = folder / ("model.gguf" if kind == "gguf" else "model")
    if kind == "hf":
        save_hf(path, config, params)
    elif kind == "gguf":
        save_gguf(path, config, params, None)
    else:
        save_model(path, config, params, None)
    return config, params, path


@pytest.mark.parametrize(
    ("kind", "family"),
    [("hf", "llama-gqa"), ("hf", "mixtral"), ("gguf", "llama-gqa"), ("checkpoint", "llama-gqa")],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_streamed_equals_quantized_afterwards(tmp_path, monkeypatch, kind, family, sharded):
    config, params, path = stored(kind, family, tmp_path)
    expected = quantize(config, params, **vars(HOW))
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2}) if sharded else None
    seen = []
    real = streaming.place

    def recorded(shape, *args):
        seen.append(shape)
        return real(shape, *args)

    monkeypatch.setattr(streaming, "place", recorded)
    loaded = load(path, mesh=mesh, quantization=HOW).params
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    if sharded:
        wanted = shardings(config, expected, mesh)
        same = jax.tree.map(
            lambda array, place: array.sharding.is_equivalent_to(place, array.ndim), loaded, wanted
        )
        assert all(jax.tree.leaves(same))
    whole = {row.shape for row in weight_table(config).values() if row.role == "matrix"}
    assert bool(seen) == (kind != "checkpoint")
    assert not whole & set(seen)


def test_what_cannot_be_quantized_is_refused_by_name(tmp_path):
    config, params, path = stored("hf", "llama-gqa", tmp_path)
    up = params["layers"]["mlp"]["up_proj"]["weight"]
    params["layers"]["mlp"]["up_proj"]["weight"] = up.at[1, 3, 3].set(np.nan)
    save_hf(path, config, params, overwrite=True)
    with pytest.raises(ValueError, match=r"layer 1 of layers\.mlp\.up_proj\.weight .* not finite"):
        load(path, quantization=HOW)
    with pytest.raises(ValueError, match="did you mean 'up_proj'"):
        load(path, quantization=Quantization("nf4", skip=("up_prj",)))
    save_model(
        tmp_path / "once", config, quantize(config, tiny_params(config), scheme="int8"), None
    )
    with pytest.raises(ValueError, match="quantized already"):
        load(tmp_path / "once", quantization=HOW)


def test_a_sixteen_bit_folder_stays_so_beside_the_quantized(tmp_path):
    config = FAMILIES["llama-gqa"].replace(dtype="bfloat16")
    save_hf(tmp_path / "model", config, tiny_params(config))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    leaves = tree.flatten(load(tmp_path / "model", quantization=HOW).params)
    plain = {str(leaf.dtype) for leaf in leaves.values() if not is_quantized(leaf)}
    assert plain == {"bfloat16"}
    save_model(tmp_path / "held", config, load(tmp_path / "model").params, None)
    cast = load(tmp_path / "held", quantization=HOW, dtype="float32")
    plain = {
        str(leaf.dtype) for leaf in tree.flatten(cast.params).values() if not is_quantized(leaf)
    }
    assert plain == {"float32"} and cast.config.dtype == "float32"
