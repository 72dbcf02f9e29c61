"""The demo from end to end, on a tiny random model in place of the real one."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import llama_jax as lj
from llama_jax import cli, tree
from llama_jax.commands import demo
from llama_jax.commands.run_config import configs_folder
from llama_jax.demo.make_task import NUM_HELDOUT
from llama_jax.demo.make_tokenizer import FOLDER as TOKENIZER
from llama_jax.formats.hf import save_hf
from llama_jax.formats.tokenizer import load_tokenizer
from tests.tiny import tiny_config, tiny_params


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE_DIR", "off")


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The shipped config with another model in it; returns the model's folder."""
    config = tiny_config(
        vocab_size=264, bos_token_id=None, eos_token_id=(258,), max_position_embeddings=512
    )
    folder = tmp_path / "model"
    save_hf(folder, config, tiny_params(config), tokenizer=load_tokenizer(TOKENIZER))
    values = yaml.safe_load((configs_folder() / demo.CONFIG).read_text())
    values["model"]["name"] = str(folder)
    values["train"]["sequence_length"] = 320  # a token a byte
    (tmp_path / demo.CONFIG).write_text(yaml.safe_dump(values))
    monkeypatch.setattr("llama_jax.commands.run_config.configs_folder", lambda: tmp_path)
    return folder


@pytest.mark.slow
def test_the_demo_trains_measures_exports_and_generates(
    tiny_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["demo", "--out", str(out), "--steps", "4", "--json"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    report: dict[str, Any] = json.loads(captured.out)
    assert report["model"] == str(tiny_demo)
    assert report["devices"] == 8
    assert report["steps"] == 4
    assert report["seconds"] > 0
    for moment in ("before", "after"):
        assert report[moment]["rows"] == NUM_HELDOUT
        assert 0 <= report[moment]["exact_match"] <= 1
    # A random model knows nothing and learns the shape of the answers within a few steps.
    assert report["after"]["loss"] < report["before"]["loss"]
    assert [row["prompt"] for row in report["batch"]] == list(demo.BATCH)

    # The export is the base with the adapter in it, a model of its own.
    base, export = lj.load(tiny_demo), lj.load(report["export"])
    before, after = tree.flatten(base.params), tree.flatten(export.params)
    changed = [
        path
        for path in before
        if not np.array_equal(np.asarray(before[path]), np.asarray(after[path]))
    ]
    assert changed and all("_proj" in path for path in changed)
    for step in range(1, 7):
        assert f"{step}/6 " in captured.err

    # The same folder again: replaced, because it is a demo's.
    (out / "note").write_text("left behind")
    assert cli.main([*argv[:-1]]) == 0
    shown = capsys.readouterr().out
    assert not (out / "note").exists()
    assert "exact match" in shown and "before" in shown and str(out / "export") in shown


def test_a_folder_that_is_no_demos_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for out, message in (
        (str(tmp_path), "holds no demo"),
        (str(tmp_path / "file"), "is a file"),
        ("", "--out is empty"),
    ):
        assert cli.main(["demo", "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (3, 0), (14, 2), (28, 4), (100, 4)])
def test_any_number_of_steps_has_a_warm_up_that_fits(steps: int, warmup: int) -> None:
    args = argparse.Namespace(steps=steps, devices=None)
    config = demo._config(args, Path("runs/demo"))
    assert (config.train.steps, config.schedule.warmup_steps) == (steps, warmup)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "train.steps"),
        (("--steps", "-9"), "train.steps"),
        (("--devices", "0"), "mesh.cpu_devices"),
    ],
)
def test_the_demo_refuses_wrong_numbers(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    # Refused before anything is written.
    assert not (tmp_path / "out").exists()
