"""Whole runs of a tiny model: the folder, resuming bit for bit, and stops that lose nothing."""

import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.formats import checkpoint, checkpoint_write
from llama_jax.formats.checkpoint_saver import SaveError
from llama_jax.load import load
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.quantized import is_quantized
from tests.train.tiny_data import TOKENIZER, chat_row, write_rows
from train.build import dry_run
from train.config import RunConfig, load_run_config
from train.data.build import build_data
from train.data.files import package_path
from train.interrupt import PreemptedError, TrainingStoppedError
from train.loop import train
from train.metrics import read_metrics
from train.samples_log import read_samples

pytestmark = pytest.mark.compiled_quickly

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 6

TINY = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": [258],
}


ONE_DEVICE = {"cpu_devices": 1}


def rows(count: int = 30) -> list[dict]:
    return [chat_row(f"what is {n}?", f"it is {n * n}") for n in range(count)]


def config(folder: Path, **changes) -> RunConfig:
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", rows())
    values = {
        "model": {
            "name": "smollm2-135m",
            "init": "random",
            "tokenizer": TOKENIZER,
            "dtype": "float32",
            "overrides": TINY,
        },
        "method": "lora",
        "data": {"train": [str(folder / "rows.jsonl")], "eval_fraction": 0.2, "packing": True},
        "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 2},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "sequence_length": 96,
            "checkpoint_every_steps": 3,
            "eval_every_steps": 3,
        },
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = {**values.get(section, {}), name: value}
        else:
            values[section] = value
    return RunConfig.from_dict(values)


def same_bits(a, b) -> None:
    a, b = tree.flatten_arrays(a), tree.flatten_arrays(b)
    assert a.keys() == b.keys()
    for path in a:
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, its config and the progress it reported."""
    run, seen = config(tmp_path_factory.mktemp("whole")), []
    return run, train(run, progress=lambda *args: seen.append(args)), seen


def test_the_run_folder_holds_what_it_should(whole):
    run, result, seen = whole
    folder = result.run_dir
    assert folder == Path(run.output)
    assert RunConfig.from_dict(json.loads((folder / "config.json").read_text())) == run
    entries = read_metrics(folder / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    for entry in entries:
        for name in ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"):
            assert np.isfinite(entry[name])
    assert [entry["learning_rate"] for entry in entries[:3]] == pytest.approx([0, 0.005, 0.01])
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [3, 6]
    assert result.final_loss == entries[-1]["loss"] < entries[0]["loss"]
    assert result.steps == STEPS and result.counters == {}
    assert checkpoint.list_steps(folder / "checkpoints") == [3, 6]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert [(done, total) for done, total, _ in seen] == [(n, STEPS) for n in range(1, STEPS + 1)]
    assert "eval_loss" in seen[2][2] and "tokens_per_second" in seen[0][2]


def test_the_report_stands_alone_and_shows_the_run(whole):
    page = (whole[1].run_dir / "report.html").read_text()
    assert re.search(r": trained on</td><td>\d+ rows, \d+\.\d\d times all", page)
    assert page.count("<polyline") >= 4
    assert "http" not in page and "<script" not in page
    for text in ("trained_tokens", "eval_fraction", "<mark>it is 0&lt;|im_end|&gt;</mark>"):
        assert text in page


def test_a_checkpoint_of_a_run_is_a_model(whole):
    _, result, _ = whole
    folder = checkpoint.step_folder(result.run_dir / "checkpoints", STEPS)
    model = load(folder)
    assert model.config == result.config
    same_bits(model.params, result.params)
    assert model.tokenizer.encode("x") == result.tokenizer.encode("x")
    assert any(isinstance(leaf, LoraTensor) for leaf in tree.flatten(model.params).values())


def test_r45_r64_a_resumed_run_equals_the_uninterrupted_one(whole, tmp_path):
    """Stopped after 4 of 6 steps, one behind a checkpoint: parameters, moments, order of the data
    and learning rates are those of the run that was not stopped."""
    _, expected, _ = whole
    run = config(tmp_path)
    stopped = train(run, stop_after=4)
    assert stopped.steps == 4
    result = train(run)
    assert result.steps == STEPS
    same_bits(result.params, expected.params)
    keep = ("step", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")
    for one, other in zip(
        read_metrics(result.run_dir / "metrics.jsonl"),
        read_metrics(expected.run_dir / "metrics.jsonl"),
        strict=True,
    ):
        assert {k: one.get(k) for k in keep} == {k: other.get(k) for k in keep}
    again = train(run)
    assert again.steps == STEPS and again.final_loss == expected.final_loss
    same_bits(again.params, expected.params)


def test_a_run_whose_template_tells_the_day_goes_on_on_another(tmp_path, monkeypatch):
    tokenizer = shutil.copytree(package_path(TOKENIZER), tmp_path / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%d %b %Y') }}" + settings["chat_template"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))

    def shown(day, **changes):
        class Today(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        monkeypatch.setattr("train.build.date", Today)
        run = config(tmp_path, model__tokenizer=str(tokenizer), **changes)
        folder = train(run, stop_after=4).run_dir
        text = (folder / "report.html").read_text()
        noted = json.loads((folder / "config.json").read_text())["data"]["template_date"]
        return noted, re.findall(r"\d\d (?:Nov|Jul) 20\d\d", text)

    kept = str(tmp_path / "kept")
    assert shown("2026-11-29") == ("2026-11-29", ["29 Nov 2026"])
    assert shown("2026-11-30") == ("2026-11-29", ["29 Nov 2026"])
    with pytest.raises(ValueError, match="data.template_date was '2026-11-29' and is '2024-07-26'"):
        shown("2026-11-30", data__template_date="2024-07-26")
    named = {"data__template_date": "2024-07-26", "output": kept}
    assert shown("2026-11-30", **named) == ("2024-07-26", ["26 Jul 2024"])


def test_r63_training_goes_on_upon_another_mesh(whole, tmp_path):
    _, expected, _ = whole
    train(config(tmp_path), stop_after=3)
    result = train(config(tmp_path, mesh=ONE_DEVICE))
    assert abs(result.final_loss - expected.final_loss) < 1e-5
    assert jax.tree.leaves(result.params)[0].devices() == {jax.devices()[0]}


def test_another_config_is_not_resumed(whole):
    run, _, _ = whole
    changed = dataclasses.replace(run, train=run.train.replace(steps=9, keep_checkpoints=5))
    with pytest.raises(ValueError, match=r"train\.steps was 6 and is 9"):
        train(changed)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        train(config(tmp_path))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file"):
        train(config(tmp_path, output=str(tmp_path / "rows.jsonl")))


def test_r65_a_damaged_checkpoint_is_left_out_only_on_request(whole, tmp_path):
    _, expected, _ = whole
    run = config(tmp_path)
    train(run, stop_after=4)
    root = Path(run.output) / "checkpoints"
    path = max((root / "step_00000004" / "trained").rglob("*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"step_00000004 is damaged.*train\.resume_older=true"):
        train(run)
    result = train(config(tmp_path, train__resume_older=True))
    same_bits(result.params, expected.params)
    assert (root / "step_00000004.damaged-0").is_dir()


def test_a_signal_saves_and_stops(tmp_path):
    run = config(tmp_path, train__steps=50, train__checkpoint_every_steps=None, mesh=ONE_DEVICE)

    def kill(done, total, note):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match="stopped by SIGTERM.*step_0000000[23]"):
        train(run, progress=kill)
    assert signal.getsignal(signal.SIGTERM) is before
    folder = Path(run.output)
    step = checkpoint.latest_step(folder / "checkpoints")
    assert step in (2, 3)
    assert [entry["step"] for entry in read_metrics(folder / "metrics.jsonl")][-1] == step
    assert json.loads((folder / "stopped.json").read_text()) == {
        "reason": "SIGTERM",
        "saved": str(checkpoint.step_folder(folder / "checkpoints", step)),
    }


@pytest.mark.parametrize("step", [3, STEPS])
def test_an_evaluation_that_a_signal_left_no_time_for_is_made_up(whole, tmp_path, step):
    """Also that of the last step, and the lines in between stay as they are."""
    _, expected, _ = whole
    run = config(tmp_path)

    def kill(done, total, note):
        if done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    # The signal comes while the step to evaluate is running.
    if step == STEPS:
        train(run, progress=kill)
    else:
        with pytest.raises(PreemptedError):
            train(run, progress=kill)
    lines = read_metrics(Path(run.output) / "metrics.jsonl")
    assert lines[-1]["step"] == step and "eval_loss" not in lines[-1]
    result = train(run)
    assert not (Path(run.output) / "stopped.json").exists()
    same_bits(result.params, expected.params)
    for one, other in zip(
        read_metrics(result.run_dir / "metrics.jsonl"),
        read_metrics(expected.run_dir / "metrics.jsonl"),
        strict=True,
    ):
        assert (one["step"], one["loss"]) == (other["step"], other["loss"])
        assert one.get("eval_loss") == other.get("eval_loss")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(tmp_path):
    run = config(
        tmp_path,
        method="full",
        optimizer={"name": "sgd", "learning_rate": 1e30, "max_grad_norm": None},
        schedule={"name": "constant"},
        mesh=ONE_DEVICE,
    )
    message = r"at step \d the loss is .*holds the samples \d+, .*stopped\.json.*is saved in"
    with pytest.raises(TrainingStoppedError, match=message) as stopped:
        train(run)
    assert not isinstance(stopped.value, PreemptedError)
    folder = Path(run.output)
    entries = read_metrics(folder / "metrics.jsonl")
    bad = [e for e in entries if e["loss"] is None or e["grad_norm"] is None]
    last = checkpoint.latest_step(folder / "checkpoints")
    # It is noticed while the next step runs, whose update is left out if it is not finite either.
    assert bad and last == entries[-1]["step"] <= bad[0]["step"] + 1
    facts = json.loads((folder / "stopped.json").read_text())
    assert facts["reason"] == "not finite" and facts["step"] == bad[0]["step"]
    assert facts["saved"] == str(checkpoint.step_folder(folder / "checkpoints", last))
    samples = {entry["step"]: entry["samples"] for entry in read_samples(folder / "samples.jsonl")}
    assert facts["samples"] == samples[facts["step"]] != []
    named = ", ".join(str(number) for number in facts["samples"][:20])
    assert named in str(stopped.value)
    state = load(facts["saved"]).params
    assert all(np.isfinite(array).all() for array in tree.flatten_arrays(state).values())


def test_the_checkpoint_with_the_lowest_evaluation_loss_is_kept(tmp_path):
    run = config(
        tmp_path,
        optimizer={"learning_rate": 0.3},
        schedule={"name": "constant"},
        train__checkpoint_every_steps=1,
        train__eval_every_steps=1,
        train__keep_checkpoints=1,
        train__keep_best=1,
        mesh=ONE_DEVICE,
    )
    result = train(run)
    losses = {e["step"]: e["eval_loss"] for e in read_metrics(result.run_dir / "metrics.jsonl")}
    best = min(losses, key=lambda step: (losses[step], -step))
    assert checkpoint.list_steps(result.run_dir / "checkpoints") == sorted({best, STEPS})


def test_a_save_that_fails_ends_the_run_and_is_named(tmp_path, monkeypatch):
    def full(folder, manifest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_write, "write_manifest", full)
    with pytest.raises(SaveError, match="step 3 could not be written: .*No space left"):
        train(config(tmp_path, mesh=ONE_DEVICE))
    monkeypatch.undo()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert train(config(tmp_path, mesh=ONE_DEVICE)).steps == STEPS


def test_r62_a_run_does_not_start_over_beside_a_checkpoint_without_its_marker(tmp_path):
    run = config(tmp_path, mesh=ONE_DEVICE)
    train(run, stop_after=3)
    folder = checkpoint.step_folder(Path(run.output) / "checkpoints", 3)
    (folder / checkpoint.MARKER).unlink()
    with pytest.raises(ValueError, match=r"step_00000003 has no complete\.json.*accept"):
        train(run)
    checkpoint.accept(folder)
    assert train(run).steps == STEPS


@pytest.mark.slow
def test_the_time_of_a_run_goes_into_its_steps(tmp_path):
    """Reading numbers, writing them, and fetching rows happen while the devices work."""
    run = config(
        tmp_path,
        train__steps=12,
        train__checkpoint_every_steps=None,
        train__eval_every_steps=None,
        train__batch_size=256,
        data__shuffle=False,  # Grain takes milliseconds to shuffle a number below a dozen
        mesh=ONE_DEVICE,
        method="full",
    )
    result = train(run)
    seconds = result.goodput["seconds"]
    spent = {name: seconds[name] for name in ("step", "data", "report", "loop")}
    # 0.988 was measured on two busy cores; the rest is left to busier ones.
    assert spent["step"] / sum(spent.values()) > 0.95, spent
    written = json.loads((result.run_dir / "goodput.json").read_text())
    assert written["seconds"].keys() >= seconds.keys()


def test_r41_batches_without_trained_tokens_are_counted(tmp_path, monkeypatch):
    def without_labels(*args):
        data = build_data(*args)
        data.train.samples._masks[:] = 0
        return data

    monkeypatch.setattr("train.build.build_data", without_labels)
    result = train(config(tmp_path, train__steps=3, train__eval_every_steps=None, mesh=ONE_DEVICE))
    assert result.counters == {"batches_without_trained_tokens": 3}
    assert np.isnan(result.final_loss)
    assert [e["loss"] for e in read_metrics(result.run_dir / "metrics.jsonl")] == [None] * 3


def test_qlora_trains_adapters_on_a_quantized_base(tmp_path):
    run = config(
        tmp_path, method="qlora", train__steps=2, train__eval_every_steps=None, mesh=ONE_DEVICE
    )
    result = train(run)
    leaves = tree.flatten(result.params)
    leaf = leaves["layers.mlp.up_proj.weight"]
    assert isinstance(leaf, LoraTensor) and is_quantized(leaf.base)
    assert float(abs(leaf.lora_b).max()) > 0
    same_bits(load(result.run_dir / "checkpoints" / "step_00000002").params, result.params)


@pytest.mark.parametrize("method", ["full", "pretrain"])
def test_full_training_and_partial_freezing(tmp_path, method):
    run = config(
        tmp_path,
        method=method,
        train__steps=2,
        train__eval_every_steps=None,
        train__trainable=["layers", "!role:norm"],
        train__gradient_accumulation_steps=2,
        mesh={"fsdp": 2, "cpu_devices": 2},
    )
    start = train(dataclasses.replace(run, output=str(tmp_path / "start")), stop_after=1)
    result = train(run)
    before, after = tree.flatten(start.params), tree.flatten(result.params)
    for path in before:
        moved = not np.array_equal(before[path], after[path])
        assert moved == (path.startswith("layers.") and "norm" not in path), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__tokenizer": None}, "a preset, which brings no tokenizer"),
        ({"model__overrides": {**TINY, "layers": 3}}, "model.overrides has no field 'layers'"),
        ({"model__overrides": {**TINY, "vocab_size": 200}}, "vocab_size is 200"),
        ({"model__name": "smollm3"}, "neither there nor a name that is known"),
        ({"model__architecture": "llama3.2-1b"}, "model.architecture is llama3.2-1b, but smollm2"),
        ({"compute__moe": "dense"}, "compute.moe is dense, but the model has no experts"),
        ({"train__sequence_length": 129}, "reads at most 128 positions"),
        ({"train__sequence_length": 8}, "none of .* rows is left"),
        ({"train__batch_size": 6}, r"batch size 6 \(.*batch_size.*\) is not a multiple of 4"),
        ({"mesh__tensor": 8, "mesh__data": 1, "mesh__fsdp": 1}, "does not divide"),
        ({"mesh__cpu_devices": 9}, "mesh.cpu_devices is 9, but JAX runs with 8"),
        ({"lora": {"target_modules": ["q_prj"]}}, "did you mean 'q_proj'"),
        ({"train__trainable": ["q_prj"]}, "did you mean"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_a_bad_row_is_named_before_the_model_is_looked_for(tmp_path):
    run = config(tmp_path, model={"name": "nowhere"})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"txt": "x"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 31: the row has the keys txt"):
        train(run)


# What `llama-jax prune` makes first, in the header's words, has the shapes of the whole model.
MADE_FIRST = {"models/pruned": "smollm2-135m"}


# Those of a TPU slice name weights that are not here: `fit` proves them.
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-cpu.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_of_a_cpu_builds_and_lowers(path, tmp_path):
    name = load_run_config(path).model.name
    overrides = [f"output={tmp_path / 'run'}", f"model.name={MADE_FIRST.get(name, name)}"]
    report = dry_run(load_run_config(path, overrides))
    assert 0 < report["trained_parameters"] <= report["parameters"]
    assert report["data"]["dropped"] == {} and report["hlo_lines"] > 100
    assert not (tmp_path / "run").exists()
