"""The memory of one model by method: parts that can be worked out, and the compiler's whole."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_jax.cli import main
from llama_jax.mesh.slices import slice_named
from llama_jax.weights.table import num_parameters, weight_table
from tests.train.test_fit import run_config
from train.config import load_run_config
from train.memory_table import METHODS, _inference, with_method
from train.start import read_shape

pytest.importorskip("libtpu", reason="the TPU compiler is on Linux x86-64 only")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What the command prints: rows by method, and what it said meanwhile."""
    path = tmp_path_factory.mktemp("fit") / "run.yaml"
    path.write_text(json.dumps(run_config(mesh={"fsdp": 4}).to_dict()))
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        flags = ["fit", str(path), "--slice", "v5e-4", "--memory-table"]
        assert main([*flags, "--search"]) == 2
        assert main([*flags, "--json"]) == 0
    return json.loads(printed.getvalue()), said.getvalue()


@pytest.mark.slow
def test_parts_are_those_of_the_arrays_and_the_whole_is_the_compilers(table):
    run = run_config(mesh={"fsdp": 4})
    config, _ = read_shape(run)
    rows = {row["method"]: SimpleNamespace(**row) for row in table[0]}
    count = num_parameters(config)
    full, lora, qlora, inference = rows.values()
    norms = sum(math.prod(r.shape) for r in weight_table(config).values() if r.role == "norm")
    # Float32 weights and two moments, a quarter on each chip, all but norms.
    assert full.weights == pytest.approx((count - norms) + 4 * norms, rel=0.05)
    assert full.gradients == full.weights
    assert full.optimizer == pytest.approx(2 * full.weights, rel=0.01)
    assert lora.gradients < full.gradients / 2 and lora.optimizer < full.optimizer / 2
    assert qlora.weights < lora.weights
    assert (inference.gradients, inference.optimizer, full.cache) == (0, 0, 0)
    assert inference.cache > 0
    narrow = dataclasses.replace(run, compute=dataclasses.replace(run.compute, cache_dtype="int8"))
    assert _inference(narrow, slice_named("v5e-4")).cache < 0.6 * inference.cache
    for row in rows.values():
        assert row.fits and row.total <= row.limit
        parts = row.weights + row.optimizer + row.cache
        assert parts < row.total


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_run_can_be_compared_by_method(path):
    more = ()
    if path.stem == "llama3.1-8b-full-v5e-16":  # what only trained matrices have
        more = ("compute.gradient_dtype=bfloat16", "model.keep_zeros=true")
    run = load_run_config(path, more)
    for method in METHODS:
        other = with_method(run, method)
        assert other.method == method and (other.mesh, other.data) == (run.mesh, run.data)
        has = (other.lora is not None, other.quantization is not None)
        assert has == {"full": (False, False), "lora": (True, False), "qlora": (True, True)}[method]


def test_the_command_prints_the_table(table):
    rows, said = table
    assert "keep one" in said
    assert [row["method"] for row in rows] == ["full", "lora", "qlora", "inference"]
    assert all(f"{row['method']}: " in said for row in rows)
    assert {"slice", "weights", "gradients", "optimizer", "activations"} <= set(rows[0])
