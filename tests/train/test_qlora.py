"""QLoRA as a run: what the base takes, against the closed form, and that it trains."""

import math

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.formats.hf import save_hf
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.table import init_params, weight_table
from tests.train.test_loop import TINY, config
from train.loop import train
from train.setup import make_setup, make_state, open_mesh, quantization
from train.start import load_weights, read_start

pytestmark = pytest.mark.compiled_quickly

# Rows of 256 and 512 values: long enough for scales in eight bits.
WIDE = {**TINY, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def closed_form(model, scheme: str, *, double: bool) -> float:
    """Bytes of the base: packed values and scales of matrices, everything else as it is stored."""
    total = 0.0
    for row in weight_table(model).values():
        count = math.prod(row.shape)
        if row.role != "matrix":
            total += 2 * count
            continue
        size = row.shape[-1]
        rows, tiles = count // size, math.ceil(size / 64)
        if scheme == "int8":
            total += count + 4 * rows
        elif double:
            total += count / 2 + rows * (tiles + 8 * math.ceil(tiles / 256))
        else:
            total += count / 2 + rows * 4 * tiles
    return total


@pytest.mark.parametrize(
    ("scheme", "double"), [("nf4", False), ("nf4", True), ("int4", True), ("int8", False)]
)
def test_live_bytes_of_the_base_are_those_of_the_closed_form(tmp_path, scheme, double):
    """R60, in a run that reads a stored model."""
    run = config(
        tmp_path,
        method="qlora",
        model__dtype="bfloat16",
        model__overrides=WIDE,
        quantization={"scheme": scheme, "double_quantization": double},
        mesh={"fsdp": 2, "cpu_devices": 2},
    )
    model = read_start(run).config
    save_hf(tmp_path / "model", model, init_params(model, jax.random.key(0)))
    values = run.to_dict()
    values["model"] |= {"name": str(tmp_path / "model"), "init": "weights", "overrides": {}}
    run = type(run).from_dict(values)
    start = read_start(run)
    setup = make_setup(run, start.config, start.params, open_mesh(run.mesh))
    held = {id(array) for array in jax.live_arrays()}
    base = load_weights(
        run, start, mesh=setup.mesh, rules=run.compute.rules, quantization=quantization(run)
    )
    state = make_state(setup, base)
    del base
    new = [array for array in jax.live_arrays() if id(array) not in held]
    live = sum(s.data.nbytes for array in new for s in array.addressable_shards)
    adapters = bases = replicas = 0
    for leaf in tree.flatten(state.params).values():
        if isinstance(leaf, LoraTensor):
            bases += sum(array.nbytes for array in jax.tree.leaves(leaf.base))
            adapters += sum(a.nbytes for a in (leaf.lora_a, leaf.lora_b, leaf.scale))
        else:
            bases += leaf.nbytes
    expected = closed_form(start.config, scheme, double=double)
    assert bases == pytest.approx(expected, rel=1e-6)
    # Adapters, two moments of each in float32, norms and scales on both devices, nothing more.
    for array in jax.tree.leaves(state):
        if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            replicas += sum(s.data.nbytes for s in array.addressable_shards) - array.nbytes
    assert live - replicas == pytest.approx(expected + 3 * adapters, rel=0.03)
    matrices = [r.shape for r in weight_table(start.config).values() if r.role == "matrix"]
    others = sum(2 * math.prod(r.shape) for r in weight_table(start.config).values()) - 2 * sum(
        map(math.prod, matrices)
    )
    if scheme != "int8":
        assert bases <= 0.6 * sum(map(math.prod, matrices)) + others
    assert not any(array.shape in matrices for array in new if array.dtype.itemsize > 1)


def test_double_quantization_trains_and_resumes_bit_for_bit(tmp_path):
    changes = {
        "method": "qlora",
        "lora": {"lora_dropout": 0.25},  # a run that goes on drops what it would have dropped
        "model__overrides": WIDE,
        "quantization": {"scheme": "nf4", "double_quantization": True},
        "train__steps": 2,
        "train__checkpoint_every_steps": 1,
        "train__eval_every_steps": None,
        "mesh": {"fsdp": 2, "cpu_devices": 2},
    }
    whole = train(config(tmp_path, output=str(tmp_path / "whole"), **changes))
    train(config(tmp_path, **changes), stop_after=1)
    again = train(config(tmp_path, **changes))
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    leaf = tree.flatten(again.params)["layers.mlp.up_proj.weight"]
    assert leaf.base.scale.codes.dtype == np.uint8
    assert float(abs(leaf.lora_b).max()) > 0


def test_eight_bit_scales_need_many_scales(tmp_path):
    with pytest.raises(ValueError, match="double_quantization is true, but int8 has too few"):
        config(
            tmp_path, method="qlora", quantization={"scheme": "int8", "double_quantization": True}
        )
