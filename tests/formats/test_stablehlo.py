"""StableHLO: the written program alone gives the model's logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import cli
from llama_jax.formats.hf import save_hf
from llama_jax.formats.safetensors import SafetensorsFile
from llama_jax.formats.stablehlo import PARAMS, PROGRAM, SIGNATURE, TEXT, save_stablehlo
from llama_jax.model.transformer import forward
from llama_jax.weights.lora import add_lora, merge_lora
from llama_jax.weights.lora_config import LoraConfig
from tests.adapters import trained
from tests.tiny import FAMILIES, tiny_params, tiny_tokens


def run(folder, tokens):
    """As somebody does it who has jax, but not this package."""
    program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    file = SafetensorsFile(folder / PARAMS)
    arrays = {name: jnp.asarray(file.view(name)) for name in file.header.tensors}
    return np.asarray(program.call(arrays, jnp.asarray(tokens)))


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_the_program_gives_the_logits_for_any_rows_and_length(family, tmp_path):
    config = FAMILIES[family]
    params = tiny_params(config)
    files = save_stablehlo(tmp_path / "out", config, params)
    short = [tiny_tokens(1, 2)] if family == "llama-tied" else []
    for tokens in (*short, tiny_tokens(3, 9, seed=1)):
        expected = np.asarray(forward(config, params, tokens))
        np.testing.assert_allclose(run(tmp_path / "out", tokens), expected, atol=1e-5)
    assert {file.name for file in files} >= {PROGRAM, TEXT, PARAMS, SIGNATURE, "config.json"}
    text = (tmp_path / "out" / TEXT).read_text()
    assert "stablehlo.dot_general" in text and "custom_call @cu" not in text
    program = jax.export.deserialize(bytearray((tmp_path / "out" / PROGRAM).read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    signature = json.loads((tmp_path / "out" / SIGNATURE).read_text())
    shapes = [tuple(aval.shape) for aval in program.in_avals]
    assert [tuple(each["shape"]) for each in signature["arguments"]][:-1] == shapes[:-1]
    assert signature["arguments"][-1]["length"] == [2, 256]
    with pytest.raises(ValueError, match="shapes"):
        program.call(
            {name: jnp.asarray(leaf) for name, leaf in arrays_of(tmp_path / "out").items()},
            jnp.zeros((1, 257), jnp.int32),
        )


def arrays_of(folder):
    file = SafetensorsFile(folder / PARAMS)
    return {name: np.array(file.view(name)) for name in file.header.tensors}


def test_the_command_writes_merged_adapters_and_refuses_them_unmerged(tmp_path, capsys):
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    adapted = trained(config, add_lora(config, params, LoraConfig(r=2), jax.random.key(0)))
    with pytest.raises(ValueError, match="holds an adapter, which a StableHLO export cannot"):
        save_stablehlo(tmp_path / "a", config, adapted)
    save_stablehlo(tmp_path / "a", config, adapted, merge=True)
    tokens = tiny_tokens(2, 5)
    expected = np.asarray(forward(config, merge_lora(adapted), tokens))
    np.testing.assert_allclose(run(tmp_path / "a", tokens), expected, atol=1e-5)

    save_hf(tmp_path / "hf", config, params)
    arguments = ["export", str(tmp_path / "hf"), str(tmp_path / "b"), "--format", "stablehlo"]
    assert cli.main([*arguments, "--dtype", "bfloat16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert {str(array.dtype) for array in arrays_of(tmp_path / "b").values()} == {"bfloat16"}
    assert cli.main([*arguments, "--json"]) == 2  # it is there
    assert cli.main([*arguments, "--dtype", "q8_0", "--json"]) == 2
