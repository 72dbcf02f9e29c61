"""The run config: what is refused, what is filled in, and that the schema is the shipped one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.formats.yaml_text import parse_yaml
from train.config import RunConfig, load_run_config, run_config_schema
from train.sections.data import DataSection
from train.sections.mesh import MeshSection
from train.sections.model import ModelSection
from train.sections.optimizer import OPTIMIZER_DEFAULTS, OptimizerSection
from train.sections.schedule import ScheduleSection
from train.sections.train import TrainSection
from train.typed import from_dict

CONFIGS = Path(__file__).parents[2] / "configs"

BASE = {
    "model": {"name": "smollm2-135m"},
    "method": "lora",
    "data": {"train": ["rows.jsonl"]},
    "train": {"steps": 20, "batch_size": 8, "sequence_length": 64},
    "output": "runs/a",
}


def config(**changes) -> RunConfig:
    values = json.loads(json.dumps(BASE))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return RunConfig.from_dict(values)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_importing_the_config_imports_no_jax():
    code = "import sys, train.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defaults_are_filled_in_and_the_resolved_config_comes_back_equal():
    run = config(compute={"dtype": "bfloat16"})
    assert run.compute.dtype == "bfloat16"
    assert run.compute.param_dtype == "float32", "the rest of a section keeps the run's defaults"
    assert run.lora is not None and run.quantization is None
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_yaml_overrides_and_numbers(tmp_path):
    path = write(
        tmp_path,
        "model: {name: m}\nmethod: full\ndata: {train: a.jsonl}\noutput: o\n"
        "train: {steps: 3, batch_size: 8, sequence_length: 16}\n"
        "optimizer: {learning_rate: 1e-4}\n",
    )
    run = load_run_config(
        path, ["train.steps=5", "schedule.name=constant", "data.train=[b.jsonl, c.jsonl]"]
    )
    assert run.optimizer.learning_rate == 1e-4
    assert run.train.steps == 5
    assert run.schedule.name == "constant"
    assert run.data.train == ("b.jsonl", "c.jsonl")
    assert load_run_config(path, ["optimizer.max_grad_norm=null"]).optimizer.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "stepz.*did you mean 'steps'"),
        ("trian.steps=5", "trian.*did you mean 'train'"),
        ("train.steps", "section.field=value"),
        ("output.x=5", "has no fields"),
        ("train.steps=[", "not valid YAML"),
        ("train.steps=ten", "train.steps is 'ten'; it must be an integer"),
        ("train.steps=1.5", "train.steps is 1.5"),
        ("train.steps=true", "train.steps is True"),
        ("train.steps=0", "at least 1"),
        ("train.seed=-1", "train.seed is -1"),
        ("data.packing=1", "data.packing is 1; it must be true or false"),
        ("optimizer.learning_rate=.nan", "finite"),
        (
            "method=ppo",
            "method is 'ppo'; allowed are pretrain, full, lora, qlora, qat, dpo, distill",
        ),
        ("compute.remat=some", "compute.remat is 'some'"),
        ("data.train={a: b}", "data.train"),
        ("data.eval_fraction=1.0", "below 1.0"),
        ("data.template_date=2026-02-30", "a day written as 2026-11-30"),
        ("data.template_date=20261130", "data.template_date is 20261130; it must be"),
    ],
)
def test_bad_values_are_named(tmp_path, override, message):
    path = write(
        tmp_path,
        "model: {name: m}\nmethod: full\ndata: {train: a.jsonl}\noutput: o\n"
        "train: {steps: 3, batch_size: 8, sequence_length: 16}\n",
    )
    with pytest.raises(ValueError, match=message):
        load_run_config(path, [override])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {}, "method": "full"}, "section lora is set, but method full"),
        ({"quantization": {}}, "section quantization is set, but method lora"),
        ({"lora": {"r": 0}}, "lora.r is 0"),
        ({"lora": {"rank": 4}}, "lora has no field 'rank'"),
        ({"train__gradient_accumulation_steps": 3}, "not a multiple"),
        ({"train__eval_every_steps": 5}, "nothing to evaluate on"),
        ({"schedule__warmup_steps": 21}, "take 21 updates, but train.steps is 20"),
        ({"data__eval": ["e"], "data__eval_fraction": 0.1}, "keep one"),
        ({"model__overrides": {"vocab_size": 8}}, "init: random"),
        ({"output": ""}, "output is empty"),
        ({"output": " "}, "output is empty"),
        ({"data__cache": ""}, "data.cache is empty"),
        ({"data__train": ""}, r"data.train\[0\] is empty"),
        ({"data__eval": ["a.jsonl", " "]}, r"data.eval\[1\] is empty"),
        ({"model__tokenizer": ""}, "model.tokenizer is empty"),
        ({"data__train": {"path": "a", "weight": 0}}, r"^data.train\[0\].weight is 0"),
        ({"compute": {"rules": [["batch", "data"]]}}, "nothing about embed, expert_embed, experts"),
        ({"compute": {"rules": [["bach", "data"]]}}, "did you mean 'batch'"),
        ({"data__train": []}, "data.train is empty"),
        ({"mesh": {"data": -1}}, "only one may be"),
        ({"mesh": {"tensor": 0}}, "mesh.tensor is 0"),
        ({"schedule": {"name": "wsd"}}, "decay_steps is missing"),
        ({"schedule": {"name": "constant", "decay_steps": 3}}, "constant"),
        ({"schedule": {"name": "constant", "final_ratio": 0.1}}, "constant"),
        (
            {"schedule": {"decay_steps": 0, "final_ratio": 0.1}},
            "ratio is 0.1, but decay_steps is 0",
        ),
        ({"schedule": {"warmup_steps": 20, "final_ratio": 0.1}}, "warmup_steps 20 takes all"),
        (
            {"method": "dpo", "data__long_texts": "cut"},
            "long_texts is cut, but method dpo trains",
        ),
        ({"optimizer": {"name": "sgd", "offload": True}}, "offload is true, but sgd without"),
        ({"data__prefetch": 0, "data__num_workers": 2}, "num_workers is 2, but data.prefetch is 0"),
        ({"train__sample_max_tokens": 9}, "sample_max_tokens is 9, but train.sample_prompts is"),
        ({"compute": {"gradient_dtype": "float16"}}, "allowed are float32, bfloat16"),
        (
            {"method": "full", "compute": {"gradient_dtype": "bfloat16", "param_dtype": "float32"}},
            "gradient_dtype is bfloat16.*param_dtype is float32 and compute.dtype float32; set",
        ),
        (
            {
                "compute": {
                    "gradient_dtype": "bfloat16",
                    "dtype": "bfloat16",
                    "param_dtype": "float32",
                }
            },
            "a section lora no plain matrix is trained",
        ),
    ],
)
def test_combinations_without_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_missing_fields_say_what_they_are():
    with pytest.raises(ValueError, match="train.steps is missing: batches to train on"):
        config(train={"batch_size": 8, "sequence_length": 8})


def test_a_key_given_twice_is_an_error():
    with pytest.raises(ValueError, match="'steps' is given twice"):
        parse_yaml("train: {steps: 1, steps: 2}", "x.yaml")


@pytest.mark.parametrize("name", sorted(OPTIMIZER_DEFAULTS))
def test_every_optimizer_fills_in_what_it_reads_and_refuses_the_rest(name):
    section = OptimizerSection(name=name)
    assert config(optimizer={"name": name}).optimizer == section
    reads = OPTIMIZER_DEFAULTS[name]
    for option in ("beta1", "beta2", "epsilon", "momentum", "decay_rate", "weight_decay"):
        assert getattr(section, option) == reads.get(option)
        if option not in reads:
            with pytest.raises(ValueError, match=f"{option}.*{name} does not read it"):
                OptimizerSection(name=name, **{option: 0.5})
        else:
            assert getattr(OptimizerSection(name=name, **{option: 0.5}), option) == 0.5


def test_sections_are_checked_when_built_in_python_too():
    with pytest.raises(ValueError, match="schedule.warmup_steps is -1"):
        ScheduleSection(warmup_steps=-1)
    with pytest.raises(ValueError, match="model.init is 'zeros'"):
        ModelSection(name="m", init="zeros")
    rest = {"tensor": 1, "context": 1, "expert": 1}
    assert MeshSection(data=2).sizes() == {"data": 2, "fsdp": -1, **rest}


@pytest.mark.parametrize(
    ("evaluated", "saved", "is_kept"),
    [(None, 2, False), (2, None, False), (3, 4, False), (4, 5, False), (2, 4, True), (5, 2, True)],
)
def test_the_best_checkpoints_must_be_evaluated_ones(evaluated, saved, is_kept):
    train = {"steps": 12, "batch_size": 8, "sequence_length": 64, "keep_best": 3}
    train |= {"eval_every_steps": evaluated, "checkpoint_every_steps": saved}
    if is_kept:
        assert config(train=train, data__eval=["e"]).train.keep_best == 3
        return
    with pytest.raises(ValueError, match=r"train.keep_best is 3, but .*eval_every_steps is .*or"):
        config(train=train, data__eval=["e"])


@pytest.mark.parametrize(
    "compute", [{"remat": "none"}, {"remat": "dots"}, {"remat": "full", "moe": "dense"}]
)
def test_chunks_of_experts_that_nothing_cuts_are_refused(compute):
    with pytest.raises(ValueError, match=r"compute.moe_chunk_tokens is 64, .* compute.remat is"):
        config(compute={**compute, "moe_chunk_tokens": 64})
    assert config(compute=compute).compute.moe_chunk_tokens == 8192


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ValueError, match="run.yaml is not a text in UTF-8"):
        load_run_config(path)


@pytest.mark.parametrize("kind", [TrainSection, DataSection, OptimizerSection])
def test_numbers_beyond_any_array_are_refused_by_name(kind):
    needed = {"steps": 1, "batch_size": 1, "sequence_length": 2, "train": "x"}
    names = [spec.name for spec in dataclasses.fields(kind) if "int" in str(spec.type)]
    names += [spec.name for spec in dataclasses.fields(kind) if "float" in str(spec.type)]
    assert names
    for name in names:
        values = {key: needed[key] for key in needed if key in kind.__dataclass_fields__}
        with pytest.raises(ValueError, match=name):
            from_dict(kind, values | {name: 10**400})


def test_the_shipped_schema_is_current():
    """python -m train.config rewrites it."""
    assert json.loads((CONFIGS / "schema.json").read_text()) == run_config_schema()


def test_the_schema_describes_every_field_and_allows_no_other():
    schema = run_config_schema()
    assert schema["required"] == ["model", "data", "train", "method", "output"]
    assert schema["additionalProperties"] is False
    steps = schema["properties"]["train"]["properties"]["steps"]
    assert steps == {"type": "integer", "minimum": 1, "description": "batches to train on"}
    assert schema["properties"]["optimizer"]["properties"]["name"]["enum"][0] == "adamw"
    held = schema["properties"]["compute"]["properties"]["param_dtype"]
    assert held["default"] == config().compute.param_dtype == "float32"
    assert held["description"].startswith("of the trained parameters; None keeps the dtype")
    lora = schema["properties"]["lora"]["anyOf"][0]["properties"]
    assert lora["rank_pattern"]["description"].startswith("another r or lora_alpha for modules")
    bare = [
        f"{name}.{field}"
        for name, section in schema["properties"].items()
        for kind in section.get("anyOf", [section])
        for field, entry in kind.get("properties", {}).items()
        if not entry.get("description")
    ]
    assert bare == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_parses_and_starts_with_its_command(path):
    run = load_run_config(path)
    header = path.read_text().split("\nmodel:")[0]
    assert f"llama-jax train {path.name}" in header
    for word in ("# Hardware:", "# Takes:", "# Result:"):
        assert word in header
    assert run.output == f"runs/{path.stem.removesuffix('-cpu')}"
