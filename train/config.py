"""The run config: one YAML file says everything about a training run.

Everything here is checked before JAX is imported, so that a mistake costs a second. What the
fields mean is said beside them, in `train/sections/`, and `configs/schema.json` carries the same
words to editors.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_jax.config import Compute
from llama_jax.formats.json_fields import read_text
from llama_jax.formats.yaml_text import parse_yaml
from llama_jax.weights.lora_config import LoraConfig
from train.config_checks import check_run
from train.methods import check_sections, filled_in
from train.sections.data import DataSection
from train.sections.distill import DistillSection
from train.sections.dpo import DpoSection
from train.sections.mesh import MeshSection
from train.sections.model import ModelSection
from train.sections.optimizer import OptimizerSection
from train.sections.qat import QatSection
from train.sections.quantization import QuantizationSection
from train.sections.schedule import ScheduleSection
from train.sections.train import TrainSection
from train.sections.wandb import WandbSection
from train.typed import Section, from_dict, json_schema, option, to_dict


@dataclass(frozen=True)
class RunConfig(Section):
    """A whole run; the sections are the top-level keys of the YAML file."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    method: Literal["pretrain", "full", "lora", "qlora", "qat", "dpo", "distill"] = option(
        "pretrain: every token of every row counts, all weights train; full: only answers of chat "
        "and instruction rows count, all weights train; lora: adapters train; qlora: adapters "
        "train on a quantized base; qat: as full, with products rounded as they will be served, or "
        "with a section lora adapters on such products; dpo: preference rows, with a section lora "
        "adapters train, on a quantized base with a section quantization, without either all "
        "weights do; distill: a student learns from the teacher of section distill, on adapters "
        "where there is a section lora"
    )
    output: str = option("the run folder; an existing one of the same config is resumed")
    optimizer: OptimizerSection = field(default=OptimizerSection())
    schedule: ScheduleSection = field(default=ScheduleSection())
    mesh: MeshSection = field(default=MeshSection())
    compute: Compute = field(default=Compute(param_dtype="float32"))
    lora: LoraConfig | None = None
    quantization: QuantizationSection | None = None
    qat: QatSection | None = None
    dpo: DpoSection | None = None
    distill: DistillSection | None = None
    wandb: WandbSection | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, section in filled_in(self).items():
            object.__setattr__(self, name, section)
        check_sections(self)
        check_run(self)
        if not self.output.strip():
            raise ValueError("output is empty; name the run folder")

    def to_dict(self) -> dict[str, Any]:
        """Everything, defaults included; `from_dict` gives an equal config back."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        return from_dict(cls, values)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `section.field=value` overrides, whose values are YAML.

    Raises ValueError naming the file and the field, FileNotFoundError for a missing file.
    """
    path = Path(path)
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: the run config must be a mapping with the key `model` and more")
    for text in overrides:
        _override(values, text)
    try:
        return RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ValueError(f"override {text!r} is not of the form section.field=value")
    node = values
    *parents, last = key.split(".")
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ValueError(f"override {text!r}: {name} is {node!r}, which has no fields")
    node[last] = parse_yaml(value, f"override {text!r}")


def run_config_schema() -> dict[str, Any]:
    """The JSON Schema that `configs/schema.json` holds."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llama-jax run config",
        **json_schema(RunConfig),
    }


def main() -> None:
    """Rewrites `configs/schema.json` of this checkout."""
    path = Path(__file__).parent.parent / "configs" / "schema.json"
    path.write_text(json.dumps(run_config_schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
