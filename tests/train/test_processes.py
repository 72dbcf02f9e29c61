"""Two and four real processes on this machine against one: the same training."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats import checkpoint, hf
from llama_jax.load import load
from llama_jax.presets import presets
from tests.tiny import tiny_params
from tests.train.command import finish, start, start_each, write_run
from tests.train.test_loop import TINY
from tests.train.tiny_data import byte_tokenizer
from train.metrics import read_metrics
from train.samples_log import read_samples

pytestmark = pytest.mark.compiled_quickly

STEPS = 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder):
    return write_run(folder, train__checkpoint_every_steps=3, train__eval_every_steps=3)


@pytest.fixture(scope="module")
def one(config, folder, cache):
    """The run of one process."""
    finish(start(config, f"output={folder / 'one'}", cache=cache))
    return folder / "one"


def same_training(run: Path, expected: Path, *, exact: bool = False) -> None:
    """Losses to 1e-6, weights to 1e-5, samples and checkpoints exactly. Sums over processes are
    made in another order than within one, hence not bit for bit; an evaluation's sum over all
    tokens is a float32, two units of whose last place may be a little more than 1e-6 a token."""
    a, b = read_metrics(run / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl")
    assert [entry["step"] for entry in a] == [entry["step"] for entry in b]
    for one, other in zip(a, b, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], abs=0 if exact else 1e-6)
        assert ("eval_loss" in one) == ("eval_loss" in other)
        if "eval_loss" in one:
            tokens = other["eval_tokens"]
            unit = float(np.spacing(np.float32(other["eval_loss"] * tokens))) / tokens
            allowed = max(1e-6, 2.1 * unit)
            assert one["eval_loss"] == pytest.approx(other["eval_loss"], abs=allowed)
    assert read_samples(run / "samples.jsonl") == read_samples(expected / "samples.jsonl")
    roots = [folder / "checkpoints" for folder in (run, expected)]
    assert checkpoint.list_steps(roots[0]) == checkpoint.list_steps(roots[1])
    final = [tree.flatten_arrays(load(folder).params) for folder in (run, expected)]
    assert final[0].keys() == final[1].keys()
    for path, array in final[0].items():
        np.testing.assert_allclose(array, final[1][path], atol=0 if exact else 1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one_does(config, folder, cache, one, count):
    run = folder / f"of{count}"
    errors = finish(start(config, f"output={run}", cache=cache, count=count))
    same_training(run, one)
    # Only process 0 speaks.
    assert "compiling the step" in errors[0]
    assert not any("INFO" in error or "loss" in error for error in errors[1:])
    assert {path.name for path in run.iterdir()} == {path.name for path in one.iterdir()}
    for step in checkpoint.list_steps(run / "checkpoints"):
        found = checkpoint.step_folder(run / "checkpoints", step)
        checkpoint.verify(found)
        # Each process wrote what its devices hold.
        assert len(list((found / "optimizer").glob("ocdbt.process_*"))) == count


def test_processes_that_were_not_started_alike_say_so_and_none_waits(tmp_path, cache):
    config = write_run(tmp_path, train__seed=1)
    other = tmp_path / "other.yaml"
    rows = tmp_path / "rows.jsonl"
    changed = config.read_text().replace("seed: 1", "seed: 2")
    lines = rows.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[1:]))
    other.write_text(changed.replace(str(rows), str(tmp_path / "other.jsonl")))
    run = f"output={tmp_path / 'run'}"
    errors = finish(start_each([config, other], run, cache=cache), code=2)
    for error in errors:
        assert "config.train.seed is 1 in process 0 and 2 in process 1" in error
        assert "the training rows is" in error and "Give all of them the same config" in error
    other.write_text(changed.replace(str(rows), "missing.jsonl"))
    processes = start_each([config, other], run, cache=cache)
    first, second = (process.communicate(timeout=240)[1] for process in processes)
    assert [process.returncode for process in processes] == [1, 2]
    assert "process 1: the data file missing.jsonl does not exist" in first
    assert "the data file missing.jsonl does not exist" in second
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_r63_other_counts_of_processes_and_devices_go_on(config, folder, cache, one):
    """Two processes, stopped by a signal that only one of them gets, then four devices in one."""
    run = folder / "moved"
    options = [f"output={run}", "train.checkpoint_every_steps=1"]
    processes = start(config, *options, cache=cache, count=2)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file() or not metrics.read_text():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    errors = finish(processes, code=75)
    assert all("stopped by SIGTERM" in error for error in errors)
    stopped = checkpoint.latest_step(run / "checkpoints")
    assert stopped is not None and 1 <= stopped < STEPS
    assert [entry["step"] for entry in read_metrics(metrics)] == list(range(1, stopped + 1))
    finish(start(config, f"output={run}", "train.checkpoint_every_steps=3", cache=cache))
    same_training(run, one)


def test_r63_what_one_process_saved_several_read_bit_for_bit(config, folder, cache, one):
    """And the other way round: a finished run is opened and left as it is."""
    before = {path: path.stat().st_mtime_ns for path in (one / "checkpoints").rglob("*")}
    errors = finish(start(config, f"output={one}", cache=cache, count=2))
    assert "resuming from step 6" in errors[0] and "all 6 steps are done" in errors[0]
    assert {path: path.stat().st_mtime_ns for path in (one / "checkpoints").rglob("*")} == before


@pytest.mark.slow
def test_stored_weights_are_read_where_they_are_needed(tmp_path, cache):
    """Training from a Hugging Face folder: each process reads its slices."""
    shape = {**presets["smollm2-135m"].to_dict(), **TINY}
    model = ModelConfig.from_dict({**shape, "dtype": "float32"})
    hf.save_hf(tmp_path / "model", model, tiny_params(model), tokenizer=byte_tokenizer())
    changes = {
        "model": {"name": str(tmp_path / "model")},
        "method": "full",
        "train__steps": 2,
    }
    config = write_run(tmp_path, **changes)
    for count in (1, 2):
        run = tmp_path / f"of{count}"
        finish(start(config, f"output={run}", cache=cache, count=count))
    same_training(tmp_path / "of2", tmp_path / "of1")
