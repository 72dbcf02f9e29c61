"""Whole runs of DPO: with adapters and without, stopped and gone on with, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.quantized import is_quantized
from tests.train.test_loop import config, same_bits
from tests.train.tiny_data import chat_row, write_rows
from train.build import build, lower
from train.config import RunConfig, load_run_config
from train.loop import train
from train.metrics import read_metrics
from train.reference import FILE, reference_log_probs
from train.setup import init_random, make_state

pytestmark = pytest.mark.compiled_quickly

CONFIGS = Path(__file__).parents[2] / "configs"


def pairs(count: int = 20) -> list[dict]:
    return [
        {"prompt": f"what is {n}?", "chosen": f"it is {n * n}", "rejected": f"who knows {n}"}
        for n in range(count)
    ]


def dpo(folder: Path, **changes) -> RunConfig:
    write_rows(folder / "rows.jsonl", changes.pop("rows", pairs()))
    changes = {
        "data__packing": False,
        "mesh": {"cpu_devices": 1},
        "train__batch_size": 2,
        "train__steps": 5,
        "train__eval_every_steps": 5,
        **changes,
    }
    return config(folder, method="dpo", **changes)


KEEP = ("step", "loss", "reward_margin", "reward_accuracy", "grad_norm", "eval_reward_margin")


def numbers(result) -> list[dict]:
    entries = read_metrics(result.run_dir / "metrics.jsonl")
    return [{name: entry.get(name) for name in KEEP} for entry in entries]


@pytest.mark.parametrize("changes", [{"lora": {"r": 4}}, {}], ids=["adapter_off", "cached"])
def test_a_run_stopped_and_gone_on_with_equals_one_that_was_not(tmp_path, changes):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    run = dpo(tmp_path / "whole", **changes)
    assert run.dpo.reference == ("adapter_off" if changes else "cached")
    whole = train(run)
    entries = numbers(whole)
    assert entries[0]["loss"] == pytest.approx(np.log(2), rel=1e-4), "nothing is learned yet"
    assert whole.final_loss < entries[0]["loss"]
    assert entries[-1]["eval_reward_margin"] is not None
    assert (whole.run_dir / FILE).exists() == (not changes)

    again = dpo(tmp_path / "stopped", **changes)
    train(again, stop_after=4)
    result = train(again)
    assert numbers(result) == entries
    same_bits(result.params, whole.params)
    adapted = any(isinstance(leaf, LoraTensor) for leaf in tree.flatten(result.params).values())
    assert adapted == bool(changes)


def test_a_cached_reference_is_checked_and_not_made_up(tmp_path):
    run = dpo(tmp_path)
    folder = train(run, stop_after=3).run_dir
    stored = dict(np.load(folder / FILE))
    assert stored["train"].shape == (2 * 16,) and stored["eval"].shape == (2 * 4,)
    (folder / FILE).rename(folder / "aside.npz")
    with pytest.raises(ValueError, match=r"reference.npz is missing.*before the first step"):
        train(run)
    np.savez(folder / FILE, **{**stored, "fingerprint": np.str_("0" * 64)})
    with pytest.raises(ValueError, match=r"reference.npz holds log-probabilities of other rows"):
        train(run)
    content = (folder / "aside.npz").read_bytes()
    place = content.index(stored["train"].tobytes())
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    for damaged in (b"", b"{}", content[:-40], flipped):
        (folder / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"reference.npz is damaged \(.*; bring the file back"):
            train(run)
    np.savez(folder / FILE, fingerprint=stored["fingerprint"], train=stored["train"])
    with pytest.raises(ValueError, match=r"reference.npz does not hold a number for each sample"):
        train(run)
    (folder / "aside.npz").rename(folder / FILE)
    assert train(run).steps == 5


def test_the_cached_reference_is_the_model_before_the_first_step_on_any_mesh(tmp_path):
    found = []
    for mesh in ({"cpu_devices": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        run = dpo(tmp_path, mesh=mesh)
        _, setup, data = build(run)
        with jax.set_mesh(setup.mesh):
            params = make_state(setup, init_random(setup)).params
            found.append(reference_log_probs(setup, data.train, params))
    assert len(found[0]) == len(data.train.samples) and (found[0] < 0).all()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_a_quantized_base_with_adapters(tmp_path):
    run = dpo(tmp_path, lora={"r": 4}, quantization={"scheme": "int8"}, train__steps=3)
    result = train(run)
    leaf = tree.flatten(result.params)["layers.mlp.up_proj.weight"]
    assert isinstance(leaf, LoraTensor) and is_quantized(leaf.base)
    assert float(abs(leaf.lora_b).max()) > 0


def lowered(run: RunConfig) -> str:
    _, setup, _ = build(run)
    with jax.set_mesh(setup.mesh):
        return lower(setup).as_text()


def test_every_field_of_the_section_changes_the_step(tmp_path):
    sections = [{}, {"beta": 0.2}, {"loss": "ipo"}, {"label_smoothing": 0.1}]
    sections.append({"reference": "cached"})
    texts = {lowered(dpo(tmp_path, lora={"r": 4}, dpo=section)) for section in sections}
    assert len(texts) == len(sections)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo": {"reference": "adapter_off"}}, "there is no adapter to switch off"),
        ({"quantization": {}}, "quantized weights cannot be trained"),
        ({"data__packing": True}, "data.packing is true, but method dpo"),
        ({"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "loss ipo does not read it"),
        ({"dpo": {"beta": 0.0}}, "dpo.beta is 0.0; it must be above 0"),
        ({"dpo": {"gamma": 1.0}}, "dpo has no field 'gamma'"),
        ({"rows": [chat_row("q", "a")]}, r"rows.jsonl, line 1: a chat row; method dpo trains on"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(dpo(tmp_path, **changes))


def test_other_methods_refuse_preferences_and_the_section(tmp_path):
    write_rows(tmp_path / "rows.jsonl", pairs())
    with pytest.raises(ValueError, match=r"line 1: a preference row; method lora trains on text"):
        train(config(tmp_path))
    with pytest.raises(ValueError, match="section dpo is set, but method lora"):
        config(tmp_path, dpo={})


@pytest.mark.slow
def test_the_shipped_config_learns_the_preference(tmp_path):
    run = load_run_config(CONFIGS / "tiny-dpo-cpu.yaml", [f"output={tmp_path / 'run'}"])
    run = dataclasses.replace(run, mesh=run.mesh.replace(cpu_devices=1))
    result = train(run)
    last = read_metrics(result.run_dir / "metrics.jsonl")[-1]
    assert last["eval_loss"] < 0.45 and last["eval_reward_accuracy"] >= 0.9
