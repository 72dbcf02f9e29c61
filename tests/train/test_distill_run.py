"""Whole runs of distillation: stopped and gone on with, by pmap, from slices, and refusals."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats.checkpoint import save_model
from llama_jax.formats.hf import save_hf
from llama_jax.load import load
from llama_jax.weights.quantize import quantize
from llama_jax.weights.table import init_params
from tests.train.test_loop import TINY, config, same_bits
from tests.train.tiny_data import byte_tokenizer, write_rows
from train.build import build, lower
from train.config import RunConfig
from train.loop import train
from train.metrics import read_metrics

pytestmark = pytest.mark.compiled_quickly

TEACHER = ModelConfig(
    model_type="llama",
    rms_norm_eps=1e-5,
    bos_token_id=None,
    **{
        **TINY,
        "vocab_size": 272,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "eos_token_id": (258,),
    },
)
ALONE = {"cpu_devices": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "model"
    params = init_params(TEACHER.replace(initializer_range=0.2), jax.random.key(7))
    save_hf(folder, TEACHER, params, tokenizer=byte_tokenizer())
    return str(folder)


def distill(folder: Path, teacher: str, **changes) -> RunConfig:
    section = {"teacher": teacher, **changes.pop("distill", {})}
    changes = {
        "mesh": ALONE,
        "train__batch_size": 4,
        "train__steps": 5,
        "train__eval_every_steps": 5,
        **changes,
    }
    return config(folder, method="distill", distill=section, **changes)


KEEP = ("step", "loss", "hard_loss", "soft_loss", "grad_norm", "eval_kl", "eval_agreement")


def numbers(result) -> list[dict]:
    entries = read_metrics(result.run_dir / "metrics.jsonl")
    return [{name: entry.get(name) for name in KEEP} for entry in entries]


def test_a_run_stopped_and_gone_on_with_equals_one_that_was_not(tmp_path, teacher):
    section = {"temperature": {"start": 2.0, "end": 1.0}, "soft_weight": {"start": 1, "end": 0}}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    before = {path: path.read_bytes() for path in Path(teacher).iterdir()}
    whole = train(distill(tmp_path / "whole", teacher, distill=section))
    entries = numbers(whole)
    assert entries[-1]["eval_kl"] is not None and entries[-1]["eval_agreement"] is not None
    first = entries[0]
    assert first["loss"] == pytest.approx(first["soft_loss"], rel=1e-5), "soft_weight begins at 1"
    again = distill(tmp_path / "stopped", teacher, distill=section)
    train(again, stop_after=3)
    result = train(again)
    assert numbers(result) == entries
    same_bits(result.params, whole.params)
    assert {path: path.read_bytes() for path in Path(teacher).iterdir()} == before
    stored = load(str(result.run_dir))
    assert stored.config.vocab_size == TINY["vocab_size"], "the student alone is saved"


def test_the_pmap_run_is_the_jit_run(tmp_path, teacher):
    found = []
    for step in ("jit", "pmap"):
        (tmp_path / step).mkdir()
        mesh = {"data": -1, "fsdp": 1, "cpu_devices": 4}
        run = distill(tmp_path / step, teacher, distill={"step": step}, mesh=mesh)
        found.append(numbers(train(run)))
    assert found[0][-1]["eval_kl"] is not None
    for one, other in zip(*found, strict=True):
        there = {name: value for name, value in one.items() if value is not None}
        assert there == pytest.approx({name: other[name] for name in there}, rel=1e-4, abs=1e-4)


def test_kept_outputs_of_all_tokens_are_the_teacher(tmp_path, teacher):
    """With k of every id the run is that with the teacher beside it; with few it is near, and it
    goes on when the teacher is gone."""
    found = {}
    for name, section in (("beside", {}), ("all", {"top_k": 259}), ("few", {"top_k": 8})):
        (tmp_path / name).mkdir()
        section = {"temperature": 1.5, **section}
        run = distill(tmp_path / name, teacher, distill=section, train__checkpoint_every_steps=2)
        found[name] = numbers(train(run, stop_after=2 if name == "few" else None))
    for one, other in zip(found["all"], found["beside"], strict=True):
        for key in ("loss", "hard_loss", "soft_loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)
    assert found["all"][-1]["eval_agreement"] == found["beside"][-1]["eval_agreement"]
    kept = tmp_path / "few" / "run" / "teacher"
    log_probs = np.load(kept / "train.log_probs.npy")
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-5)
    first = found["few"][0]
    assert first["hard_loss"] == pytest.approx(found["beside"][0]["hard_loss"], rel=1e-5)
    assert 0 < first["soft_loss"] < found["beside"][0]["soft_loss"] + 1e-5
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert numbers(train(run))[:2] == found["few"]
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == before
    for name, damage, said in (
        ("train.ids.npy", b"", "train.ids.npy cannot be read"),
        ("train.log_probs.npy", (kept / "train.log_probs.npy").read_bytes()[:-4], "cannot be read"),
        ("eval.ids.npy", (kept / "train.ids.npy").read_bytes(), r"ids.npy holds \(.* values, not"),
        ("teacher.json", b"{", "teacher.json is not valid JSON"),
    ):
        content = (kept / name).read_bytes()
        (kept / name).write_bytes(damage)
        with pytest.raises(ValueError, match=f"{said}.*; remove {kept} to have"):
            train(run)
        (kept / name).write_bytes(content)
    (kept / "teacher.json").write_text('{"rows": "others"}')
    with pytest.raises(ValueError, match="holds a teacher's outputs for other rows"):
        train(run)


def test_a_run_does_not_go_on_with_another_teacher_or_other_evaluation_rows(tmp_path, teacher):
    shutil.copytree(teacher, tmp_path / "teacher")
    held = write_rows(tmp_path / "eval.jsonl", [{"text": "one"}])
    data = {"data__eval": [held], "data__eval_fraction": 0.0, "train__steps": 4}
    run = distill(tmp_path, str(tmp_path / "teacher"), **data)
    folder = train(run, stop_after=2).run_dir
    params = init_params(TEACHER.replace(initializer_range=0.2), jax.random.key(8))
    shutil.rmtree(tmp_path / "teacher")
    save_hf(tmp_path / "teacher", TEACHER, params, tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="has other weights than when the run in .*/run began"):
        train(run)
    write_rows(tmp_path / "eval.jsonl", [{"text": "two"}])
    with pytest.raises(ValueError, match="evaluation rows are not those of the run"):
        train(run)
    write_rows(tmp_path / "eval.jsonl", [{"text": "one"}])
    (folder / "teacher.json").unlink()  # as older runs have it
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert train(run.replace(mesh=run.mesh.replace(cpu_devices=None, **mesh)), stop_after=3)
    noted = (folder / "teacher.json").read_text()
    (folder / "teacher.json").unlink()
    assert train(run).steps == 4
    assert (folder / "teacher.json").read_text() == noted, "whatever mesh the weights lie on"


def test_a_quantized_teacher_and_an_adapted_student(tmp_path, teacher):
    model = load(teacher)
    folder = tmp_path / "quantized"
    params = quantize(model.config, model.params, scheme="int8")
    save_model(folder, model.config, params, model.tokenizer)
    result = train(distill(tmp_path, str(folder), lora={"r": 4}, train__steps=3))
    assert numbers(result)[-1]["eval_kl"] > 0
    with pytest.raises(ValueError, match="teacher_dtype is bfloat16, but .* quantized"):
        build(distill(tmp_path, str(folder), distill={"teacher_dtype": "bfloat16"}))


def test_slices_of_the_teacher_begin_nearer_to_it(tmp_path, teacher):
    start = {"name": teacher, "init": "slices", "overrides": {"num_hidden_layers": 2}}
    run = distill(
        tmp_path,
        teacher,
        model=start,
        train__steps=1,
        schedule={},
        optimizer={"learning_rate": 0.0},
    )
    result = train(run)
    whole = load(teacher)
    for path, leaf in tree.flatten(result.params).items():
        expected = tree.flatten(whole.params)[path]
        expected = expected[np.asarray([0, 2])] if path.startswith("layers.") else expected
        np.testing.assert_array_equal(leaf, expected)
    start = {**start, "overrides": {"num_hidden_layers": 3}}
    (tmp_path / "same").mkdir()
    run = distill(
        tmp_path / "same",
        teacher,
        model=start,
        train__steps=1,
        schedule={},
        optimizer={"learning_rate": 0.0},
    )
    assert numbers(train(run))[-1]["eval_kl"] == pytest.approx(0, abs=1e-6)


def lowered(run: RunConfig) -> str:
    _, setup, _ = build(run)
    with jax.set_mesh(setup.mesh):
        return lower(setup).as_text()


def test_every_field_of_the_section_changes_the_step(tmp_path, teacher):
    sections = [
        {},
        {"temperature": 2.0},
        {"soft_weight": 0.9},
        {"soft_weight": {"start": 0.9, "end": 0.1}},
        {"soft_weight": {"start": 0.9, "end": 0.1, "steps": 2}},
        {"divergence": "reverse_kl"},
        {"divergence": "jensen_shannon"},
        {"teacher_dtype": "bfloat16"},
        {"on_policy": 0.5},
        {"on_policy": 0.25},
        {"on_policy": 0.5, "on_policy_temperature": 0.5},
    ]
    options = {"data__packing": False}
    texts = {
        lowered(distill(tmp_path, teacher, distill=section, **options)) for section in sections
    }
    assert len(texts) == len(sections)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, teacher):
    with pytest.raises(ValueError, match=r"have different tokenizers: of \d+ ids \d+ differ \("):
        build(distill(tmp_path, "smollm2-135m"))
    bare = tmp_path / "bare"
    save_hf(bare, TEACHER, init_params(TEACHER, jax.random.key(0)))
    with pytest.raises(ValueError, match="brings no tokenizer"):
        build(distill(tmp_path, str(bare)))
    with pytest.raises(ValueError, match="top_k is 5000, but the tokenizer has"):
        build(distill(tmp_path, teacher, distill={"top_k": 5000}))
    short = tmp_path / "short"
    small = TEACHER.replace(max_position_embeddings=16)
    save_hf(short, small, init_params(small, jax.random.key(0)), tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="reads at most 16 positions"):
        build(distill(tmp_path, str(short)))


def test_a_teacher_of_another_shape_than_the_config_says_is_refused(tmp_path, teacher):
    message = "distill.teacher_architecture is llama3.2-1b, but .* has embed_tokens.weight of shape"
    with pytest.raises(ValueError, match=message):
        build(distill(tmp_path, teacher, distill={"teacher_architecture": "llama3.2-1b"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"temperature": 0}}, "distill.temperature is 0"),
        ({"distill": {"soft_weight": 1.5}}, "distill.soft_weight is 1.5"),
        ({"distill": {"soft_weight": {"start": 0, "end": 2}}}, "distill.soft_weight.end is 2"),
        ({"distill": {"temperature": {"start": 0, "end": 2}}}, "distill.temperature.start is 0"),
        (
            {"distill": {"temperature": {"start": 2, "end": 1, "steps": 0}}},
            "^distill.temperature.steps is 0",
        ),
        ({"distill": {"hidden": {"weight": -1}}}, "^distill.hidden.weight is -1"),
        ({"distill": {"tempreature": 1}}, "did you mean 'temperature'"),
        ({"distill": {"divergence": "kl"}}, "allowed are forward_kl"),
        ({"distill": {"teacher": ""}}, "distill.teacher is empty"),
        ({"distill": {"teacher_architecture": "x"}}, "teacher_architecture is 'x'; it must"),
        ({"distill": {"step": "pmap"}, "mesh": {"fsdp": 2}}, "mesh.fsdp is 2"),
        ({"distill": {"step": "pmap"}}, "mesh.fsdp is -1"),
        ({"quantization": {}}, "quantized weights cannot be trained"),
        ({"distill": {"top_k": 4, "temperature": {"start": 2, "end": 1}}}, "at one temperature"),
        ({"distill": {"top_k": 4, "on_policy": 0.5}}, "leave one of them out"),
        ({"distill": {"top_k": 0}}, "distill.top_k is 0"),
        (
            {"distill": {"on_policy_temperature": 0.5}},
            "on_policy_temperature is 0.5, but distill.on_policy is 0",
        ),
        ({"distill": {"on_policy": 0.5}}, "data.packing is true, but distill.on_policy"),
    ],
)
def test_sections_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        distill(tmp_path, "t", **changes)


def test_the_section_belongs_to_its_method(tmp_path):
    with pytest.raises(ValueError, match="section distill is missing"):
        config(tmp_path, method="distill")
    with pytest.raises(ValueError, match="method lora does not read it"):
        config(tmp_path, distill={"teacher": "t"})
    with pytest.raises(ValueError, match="init is slices, but model.overrides does not say"):
        config(tmp_path, model={"name": "x", "init": "slices"})
    run = config(
        tmp_path,
        model={"name": "smollm2-135m", "init": "slices", "overrides": {"num_hidden_layers": 40}},
    )
    with pytest.raises(ValueError, match="model.overrides: num_hidden_layers is 40, but"):
        build(run)
