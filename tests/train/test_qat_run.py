"""Quantization-aware training as a run: resumed bit for bit, converted, and served as trained."""

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.cli import main
from llama_jax.load import load
from llama_jax.model.transformer import forward
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.quantized import IntegerTensor
from llama_jax.weights.tensors import QatTensor
from tests.tiny import tiny_tokens
from tests.train.test_loop import config, same_bits
from train.config import RunConfig
from train.loop import train
from train.setup import make_setup, open_mesh
from train.start import read_shape

pytestmark = pytest.mark.compiled_quickly

UP = "layers.mlp.up_proj.weight"


def qat(folder, **changes) -> RunConfig:
    values = {"train__steps": 2, "train__eval_every_steps": None, "mesh": {"cpu_devices": 1}}
    run = config(folder, method="qat", **{**values, **changes}).to_dict()
    return RunConfig.from_dict(run)


def test_a_run_resumes_converts_and_is_served_as_it_was_trained(tmp_path, capsys):
    """R75 through the commands."""
    changes = {"qat": {"bits": 4, "skip": ["o_proj", "role:embedding"]}}
    changes["train__checkpoint_every_steps"] = 1
    whole = train(qat(tmp_path, output=str(tmp_path / "whole"), **changes))
    train(qat(tmp_path, **changes), stop_after=1)
    result = train(qat(tmp_path, **changes))
    same_bits(result.params, whole.params)
    assert isinstance(tree.flatten(result.params)[UP], QatTensor)
    run, out = str(tmp_path / "run"), str(tmp_path / "integers")
    assert main(["quantize", run, out, "--scheme", "int8"]) == 2
    assert "was trained to be int4; choose scheme qat" in capsys.readouterr().err
    assert main(["quantize", run, out, "--scheme", "qat", "--tile", "4"]) == 2
    assert "leave --tile out" in capsys.readouterr().err
    assert main(["quantize", run, out, "--scheme", "qat"]) == 0
    served = load(out)
    leaf = tree.flatten(served.params)[UP]
    assert isinstance(leaf, IntegerTensor) and leaf.base.codebook == "int4"
    assert isinstance(tree.flatten(served.params)["layers.self_attn.o_proj.weight"], jax.Array)
    tokens = tiny_tokens(vocab=200)
    run_it = jax.jit(lambda params: forward(served.config, params, tokens))
    np.testing.assert_allclose(run_it(served.params), run_it(load(run).params), atol=1e-5)
    assert main(["quantize", out, str(tmp_path / "twice"), "--scheme", "qat"]) == 2
    assert "not trained with method qat" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_alpha": 4}])
def test_what_trains(tmp_path, lora):
    run = qat(tmp_path, **({} if lora is None else {"lora": lora}))
    setup = make_setup(run, *read_shape(run), open_mesh(run.mesh))
    leaf, mask = (tree.flatten(t)[UP] for t in (setup.abstract.params, setup.mask))
    if lora is None:
        assert (leaf.bits, leaf.backward, mask.weight) == (8, "straight_through", True)
        assert tree.flatten(setup.mask)["embed_tokens.weight"]
    else:
        assert isinstance(leaf, LoraTensor) and isinstance(leaf.base, QatTensor)
        assert (mask.base.weight, mask.lora_a, mask.lora_b) == (False, True, True)


def test_the_section_decides(tmp_path):
    def leaf(**section):
        run = qat(tmp_path, qat=section)
        setup = make_setup(run, *read_shape(run), open_mesh(run.mesh))
        return tree.flatten(setup.abstract.params)[UP]

    assert leaf(bits=4).bits == 4
    assert leaf(backward="quantized").backward == "quantized"
    assert not isinstance(leaf(skip=["up_proj"]), QatTensor)
    with pytest.raises(ValueError, match="section qat is set, but method lora does not read it"):
        config(tmp_path, method="lora", qat={"bits": 8})
