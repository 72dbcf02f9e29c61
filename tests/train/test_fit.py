"""A run compiled for TPU slices: what fits, what does not, and what is said of both."""

import json
import math

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llama_jax.cli import main
from llama_jax.mesh.slices import GENERATIONS, Slice, slice_named
from train.config import RunConfig
from train.fit import advice, best, fit, largest_batches, smallest_slices

pytest.importorskip("libtpu", reason="the TPU compiler is on Linux x86-64 only")

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def run_config(method="full", shape=SHAPE, mesh=None, batch=8, length=128, **sections):
    return RunConfig.from_dict(
        {
            "model": {
                "name": "llama3.1-8b",
                "init": "random",
                "tokenizer": "unused",
                "overrides": shape,
            },
            "method": method,
            "data": {"train": "unused.jsonl"},
            "mesh": {"fsdp": -1, **(mesh or {})},
            "compute": {
                "dtype": "bfloat16",
                "param_dtype": "float32",
                "remat": "full",
                "attention": "splash",
                **sections.pop("compute", {}),
            },
            "train": {"steps": 1, "batch_size": batch, "sequence_length": length},
            "output": "unused",
            **sections,
        }
    )


# One layer of 8B width on one chip: weights and moments alone are beyond its memory.
TOO_LARGE = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def small():
    return fit(run_config(), slice_named("v5e-4"))


def test_arguments_are_the_share_of_weights_moments_and_batch(small):
    # Weights and two moments in float32, spread over four chips, and a little that is not spread.
    share = 3 * 4 * small.parameters / 4
    assert share < small.compiled.memory.arguments < 1.1 * share + 100_000
    assert small.compiled.fits
    assert small.chip_bytes == small.compiled.memory.total


def test_moments_stay_where_they_are(small):
    # The head's rows travel to where the loss wants them, in two bytes, and their gradient back in
    # four; the embedding's gradient too. Two moments there and back would be sixteen more.
    share = 3 / 4 * SHAPE["vocab_size"] * SHAPE["hidden_size"] / 4
    assert small.compiled.collectives["all-to-all"].bytes < 16 * share


@pytest.mark.slow
def test_gradients_in_bfloat16_take_half_the_memory():
    wide = {**SHAPE, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    taken = {}
    for dtype in ("float32", "bfloat16"):
        run = run_config(shape=wide, compute={"gradient_dtype": dtype})
        result = fit(run, slice_named("v5e-4"))
        taken[dtype] = result.compiled.memory.temporaries
    # Two bytes instead of four, of nearly all parameters, which four chips share.
    matrices = 8 * 3 * 1024 * 8192
    assert taken["float32"] - taken["bfloat16"] > 0.9 * 2 * matrices / 4


def test_operations_agree_with_the_formula_and_bound_the_step(small):
    report = small.to_dict()
    assert report["flops_per_step"] == pytest.approx(report["closed_form_flops"], rel=0.01)
    assert report["model_flops_per_step"] < report["flops_per_step"]
    assert report["bound_seconds"]["compute"] == pytest.approx(small.flops / 4 / 197e12)
    assert report["bound_by"] in report["bound_seconds"]
    assert 0 < report["bound_mfu"] < 1
    assert report["advice"] == [] and report["refusal"] is None
    assert report["uncounted_loops"] == []
    json.dumps(report)


def test_every_layers_weights_are_gathered_in_each_pass(small):
    sent = small.compiled.collectives
    # Seven matrices a layer, fetched forward and backward, in bfloat16: three quarters of each
    # come from elsewhere.
    weights = 2 * (4 * 256 * 256 + 3 * 256 * 512)
    assert sent["all-gather"].bytes > 2 * 2 * weights * 3 / 4
    assert all(each.dcn_bytes == 0 for each in sent.values())


def test_slices_joined_by_the_network_send_gradients_over_it():
    result = fit(run_config(mesh={"data": 2}), slice_named("2xv5e-4"))
    assert result.slice.total_chips == 8
    assert sum(each.dcn_bytes for each in result.compiled.collectives.values()) > 0
    assert "dcn" in result.bounds()


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    result = fit(run_config(shape=TOO_LARGE), slice_named("v5e-1"))
    report = result.to_dict()
    assert not report["fits"]
    limit = GENERATIONS["v5e"].hbm_bytes
    assert report["hbm_limit"] == limit
    assert report["missing_bytes_per_chip"] == report["hbm_bytes_per_chip"] - limit > 0
    assert "RESOURCE_EXHAUSTED" in report["refusal"]
    assert report["collectives"] is None and report["bound_by"] == "compute"
    assert any("v5e-4" in line for line in report["advice"])


def test_advice_names_what_is_not_used_yet():
    run = run_config(shape=TOO_LARGE, compute={"remat": "none", "attention": "reference"}, batch=8)
    lines = " ".join(advice(fit(run, slice_named("v5e-1"))))
    for word in (
        "remat=full",
        "attention=splash",
        "gradient_dtype=bfloat16",
        "gradient_accumulation_steps=2",
        "v5e-4",
    ):
        assert word in lines


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "qat", "pretrain", "dpo"])
def test_every_method_compiles(method):
    sections = {"lora": {"r": 4, "lora_alpha": 8}} if method in ("lora", "qlora", "dpo") else {}
    result = fit(run_config(method=method, **sections), slice_named("v5e-4"))
    assert result.compiled.fits
    has_form = method in ("lora", "pretrain")
    assert (result.closed_form_flops is not None) == has_form
    if has_form:
        assert result.flops == pytest.approx(result.closed_form_flops, rel=0.02)


@pytest.mark.slow
def test_the_smallest_slice_is_found():
    said = []
    results = list(smallest_slices(run_config(batch=8), GENERATIONS["v5e"], said.append))
    # Eight rows cannot be dealt to 16 chips and more: those are named, not counted.
    assert best(results).slice == Slice(GENERATIONS["v5e"], 1)
    assert any("v5e-" in line and "not a multiple" in line for line in said)


def test_a_run_that_suits_no_slice_is_an_error_not_an_empty_answer():
    run = run_config(length=128, mesh={"fsdp": 3})
    with pytest.raises(ValueError, match="needs 3 devices"):
        list(smallest_slices(run, GENERATIONS["v5e"], lambda line: None))


def test_the_largest_batch_of_each_policy_is_found(monkeypatch):
    tried = []

    def measured(run, wanted):
        size, remat = run.train.batch_size, run.compute.remat
        tried.append((remat, size))
        limit = {"none": 0, "dots": 20, "full": 44, "offload": 60}[remat]
        return Stub(run, wanted, fits=size <= limit)

    monkeypatch.setattr("train.fit.fit", measured)
    results = list(largest_batches(run_config(), slice_named("v5e-4"), lambda line: None))
    chosen = best(results)
    assert (chosen.run.compute.remat, chosen.run.train.batch_size) == ("offload", 60)
    # Doubling, then bisection: few compiles.
    assert [size for remat, size in tried if remat == "none"] == [4]
    assert [size for remat, size in tried if remat == "dots"] == [4, 8, 16, 32, 24, 20]
    assert len(tried) < 26


class Stub:
    """Stands for a `Fit` whose compilation is decided by the test."""

    def __init__(self, run, wanted, *, fits):
        self.run, self.slice = run, wanted
        self.compiled = type("Compiled", (), {"fits": fits})()


def test_the_command_prints_a_list_and_names_wrong_input(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run_config(mesh={"slice": "v5e-4"}).to_dict()))
    assert main(["fit", str(path), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["slice"], report["chips"], report["fits"]) == ("v5e-4", 4, True)
    for name in ("hbm_bytes_per_chip", "hbm_limit", "flops_per_step", "collectives"):
        assert report[name]
    assert math.isfinite(report["compile_seconds"])
    assert main(["fit", str(path)]) == 0
    assert "v5e-4 (4 chips, 2x2" in capsys.readouterr().out
    assert main(["fit", str(path), "--slice", "v5e-5"]) == 2
    assert "there is no v5e slice of 5 chips" in capsys.readouterr().err
    path.write_text(json.dumps(run_config().to_dict()))
    assert main(["fit", str(path)]) == 2
    assert "names no slice" in capsys.readouterr().err


def test_compiled_programs_are_kept(tmp_path, capsys):
    path, cache = tmp_path / "run.yaml", tmp_path / "cache"
    path.write_text(json.dumps(run_config(mesh={"slice": "v5e-4"}, length=256).to_dict()))
    before = {
        name: getattr(jax.config, name)
        for name in (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_compile_time_secs",
            "jax_persistent_cache_min_entry_size_bytes",
        )
    }
    try:
        assert main(["fit", str(path), "--save-cache", str(cache)]) == 0
        assert main(["fit", str(path), "--save-cache", str(cache)]) == 0  # written over, no warning
        assert main(["fit", str(path), "--save-cache", str(path)]) == 2
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert "is a file; name a folder" in capsys.readouterr().err
    assert any(file.name.startswith("jit_step") for file in cache.iterdir())
