"""The run config: one YAML file says everything about a training run.

Everything here is checked before JAX is imported, so that a mistake costs a second. What the
fields mean is said beside them, and `configs/schema.json` carries the same words to editors.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from llama_jax.config import MESH_AXES, Compute
from llama_jax.formats.json_fields import read_text
from llama_jax.formats.yaml_text import parse_yaml
from llama_jax.mesh.slices import slice_named
from llama_jax.presets import preset
from llama_jax.weights.lora_config import LoraConfig
from train.typed import Section, from_dict, json_schema, option, to_dict


@dataclass(frozen=True)
class ModelSection(Section):
    """What is trained and what it starts from."""

    name: str = option(
        "a Hugging Face folder, a .gguf file, a checkpoint folder, a name of `llama-jax models`, "
        "smollm2-135m of the demo extra, or a Hub id"
    )
    init: Literal["weights", "random", "slices"] = option(
        "start from the model's weights, from random ones of its shape, or from slices of the "
        "weights: layers spread evenly and the first units of every width, as overrides say",
        default="weights",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "what weights are held in; null: as stored. Trained ones are in compute.param_dtype",
        default=None,
    )
    tokenizer: str | None = option(
        "a model, or a folder, whose tokenizer to use (package: for a shipped one); null: the "
        "model's own",
        default=None,
    )
    architecture: str | None = option(
        "a name of `llama-jax models` whose shape the weights have: `fit` then works before they "
        "are there, and weights of another shape are refused; null: what the weights say",
        default=None,
    )
    keep_zeros: bool = option(
        "what is exactly zero in the layers' matrices stays so: for models that were pruned",
        default=False,
    )
    overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "doc": "fields of the architecture, with `init: random`; with `init: slices` the sizes "
            "to cut to: num_hidden_layers, hidden_size, intermediate_size, num_attention_heads, "
            "num_key_value_heads"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is not None and not self.tokenizer.strip():
            raise ValueError(
                "model.tokenizer is empty; name a model or a folder, or set it to null"
            )
        if self.architecture is not None:
            preset(self.architecture, field="model.architecture")
        if self.overrides and self.init == "weights":
            raise ValueError(
                "model.overrides changes the architecture, which the stored weights do not fit; "
                "set model.init: random, or slices to cut them, or remove the overrides"
            )
        if self.keep_zeros and self.init != "weights":
            raise ValueError(
                f"model.keep_zeros keeps the zeros of a pruned model's weights, but model.init is "
                f"{self.init}; set it to weights, or keep_zeros to false"
            )
        if self.init == "slices" and not self.overrides:
            raise ValueError(
                "model.init is slices, but model.overrides does not say to what sizes the weights "
                "are cut; set, for example, overrides: {num_hidden_layers: 8}"
            )


@dataclass(frozen=True)
class SourceSection(Section):
    """One source of rows, where a path alone does not say enough. Exactly one of path, tfds,
    datasets and array_record names it."""

    path: str | None = option(
        "files ending in .jsonl, .json, .csv or .parquet, also compressed: a path, a URL such as "
        "gs://bucket/rows-*.jsonl, a glob, or package: for a shipped one",
        default=None,
    )
    tfds: str | None = option(
        "a prepared TFDS data set in ArrayRecord files, such as my_rows or my_rows/config:1.0.0",
        default=None,
    )
    datasets: str | None = option(
        "a Hugging Face data set: a folder of save_to_disk, or what load_dataset takes",
        default=None,
    )
    array_record: str | None = option(
        "ArrayRecord files, or a glob, whose records are rows as JSON", default=None
    )
    split: str | None = option("of tfds and datasets, such as train or train[:10%]", default=None)
    config: str | None = option("the configuration of a Hugging Face data set", default=None)
    data_dir: str | None = option("where tfds or datasets find the data", default=None)
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "doc": "the column that each field of a row is read from, such as {text: article}; "
            "other columns are left unread. null: columns are named as fields, and there are no "
            "others"
        },
    )
    weight: float | None = option(
        "share of the batches' rows, relative to the other sources'; null everywhere: every row "
        "of every source once an epoch",
        default=None,
        above=0.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("path", "tfds", "datasets", "array_record")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a data source names {' and '.join(given) or 'nothing to read'}; give exactly one "
                f"of {', '.join(kinds)}"
            )
        reads = {"tfds": ("split", "data_dir"), "datasets": ("split", "config", "data_dir")}
        for name in ("split", "config", "data_dir"):
            if getattr(self, name) is not None and name not in reads.get(given[0], ()):
                raise ValueError(f"{name} of a data source is set, but {given[0]} does not read it")
        if self.tfds is not None and self.split is None:
            raise ValueError(f"the data source tfds {self.tfds} needs a split, for example train")
        if self.columns is not None and not self.columns:
            raise ValueError("columns of a data source is empty; name a column, or leave it out")

    def place(self) -> tuple[str, str]:
        """(kind, name) of what is read."""
        for kind in ("path", "tfds", "datasets", "array_record"):
            if (name := getattr(self, kind)) is not None:
                return kind, name
        raise AssertionError("a source names something")


@dataclass(frozen=True)
class DataSection(Section):
    """Rows: chat, instruction, text or preference. A source is a path (or URL, or glob) of files,
    `package:demo/train.jsonl` for a shipped one, or a mapping that says more."""

    train: tuple[str | SourceSection, ...] = option("sources of training rows")
    eval: tuple[str | SourceSection, ...] = option("sources of rows to evaluate on", default=())
    eval_fraction: float = option(
        "part of the training rows held out for evaluation instead", default=0.0, low=0.0, below=1.0
    )
    long_rows: Literal["drop", "cut", "refuse"] = option(
        "chat, instruction and preference rows beyond sequence_length: leave out and count, cut "
        "off the end (and leave out where no answer is left), or stop",
        default="drop",
    )
    long_texts: Literal["split", "drop", "cut", "refuse"] = option(
        "text rows beyond sequence_length: split into pieces that overlap by one token, leave out, "
        "cut off the end, or stop",
        default="split",
    )
    packing: bool = option("put several samples into one row, kept apart", default=False)
    template_date: str | None = option(
        "the day, as 2026-11-30, that a chat template with strftime_now is told, as that of Llama "
        "3.2. null: the day the run began, also when it goes on on another",
        default=None,
    )
    shuffle: bool = option("a new order every epoch, decided by train.seed", default=True)
    prefetch: int = option(
        "batches made ahead by threads while the devices work; 0: each when it is asked for",
        default=2,
        low=0,
    )
    num_workers: int = option("threads that make batches ahead", default=1, low=1, high=256)
    cache: str | None = option(
        "a local folder that keeps the tokenized rows, so that they need not fit in memory and the "
        "next start need not make them again; sources that changed are noticed. null: in memory",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers > 1 and not self.prefetch:
            raise ValueError(
                f"data.num_workers is {self.num_workers}, but data.prefetch is 0, so that no "
                f"thread makes batches ahead; set prefetch, or num_workers to 1"
            )
        if not self.train:
            raise ValueError("data.train is empty; name at least one source of rows")
        for name in ("train", "eval"):
            for number, entry in enumerate(getattr(self, name)):
                if isinstance(entry, str) and not entry.strip():
                    raise ValueError(f"data.{name}[{number}] is empty; name a source of rows")
        if self.template_date is not None:
            _check_date(self.template_date)
        if self.cache is not None and not self.cache.strip():
            raise ValueError("data.cache is empty; name a local folder, or set it to null")
        weighted = [isinstance(entry, SourceSection) and bool(entry.weight) for entry in self.train]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"data.train[{weighted.index(False)}] has no weight, but other sources have; give "
                f"all of them one, or none"
            )
        for number, entry in enumerate(self.eval):
            if isinstance(entry, SourceSection) and entry.weight is not None:
                raise ValueError(
                    f"data.eval[{number}].weight means nothing: every evaluation row is scored once"
                )
        if self.eval and self.eval_fraction:
            raise ValueError(
                "data.eval and data.eval_fraction both say what to evaluate on; keep one"
            )


def _check_date(text: str) -> None:
    try:
        known = date.fromisoformat(text).isoformat() == text
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"data.template_date is {text!r}; it must be a day written as 2026-11-30, or null"
        )


# What each optimizer reads, with the defaults of its paper or of the common implementations.
OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0},
    "adafactor": {"decay_rate": 0.8, "epsilon": 1e-30, "weight_decay": 0.0},
    "lion": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0},
    "muon": {
        "momentum": 0.95,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.0,
    },
    "sgd": {"momentum": 0.0, "weight_decay": 0.0},
}


@dataclass(frozen=True)
class OptimizerSection(Section):
    """The update rule. A field left out gets the optimizer's own default; one that the chosen
    optimizer does not read is refused."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = option(
        "muon orthogonalizes the update of matrices and uses adam for everything else",
        default="adamw",
    )
    learning_rate: float = option("the peak of the schedule", default=1e-4, low=0.0)
    beta1: float | None = option("decay of the first moment", default=None, low=0.0, below=1.0)
    beta2: float | None = option("decay of the second moment", default=None, low=0.0, below=1.0)
    epsilon: float | None = option("added to the denominator", default=None, above=0.0)
    momentum: float | None = option("of sgd and muon", default=None, low=0.0, below=1.0)
    decay_rate: float | None = option(
        "exponent of adafactor's second moment decay", default=None, above=0.0, below=1.0
    )
    weight_decay: float | None = option(
        "decoupled decay of matrices and embeddings, times the learning rate", default=None, low=0.0
    )
    max_grad_norm: float | None = option(
        "clip the gradient of the trained parameters to this global norm; null: never",
        default=1.0,
        above=0.0,
    )
    stochastic_rounding: bool = option(
        "round updated bfloat16 weights up or down by chance, so that updates too small for their "
        "last bit still add up; needs compute.param_dtype bfloat16",
        default=False,
    )
    offload: bool = option(
        "keep moments in the host's memory, and on the devices only while they are updated",
        default=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        reads = OPTIMIZER_DEFAULTS[self.name]
        for name in ("beta1", "beta2", "epsilon", "momentum", "decay_rate", "weight_decay"):
            value = getattr(self, name)
            if name in reads and value is None:
                object.__setattr__(self, name, reads[name])
            elif name not in reads and value is not None:
                raise ValueError(
                    f"optimizer.{name} is {value!r}, but {self.name} does not read it (it reads "
                    f"{', '.join(reads)}); remove it or choose another optimizer"
                )
        if self.offload and self.name == "sgd" and not self.momentum:
            raise ValueError(
                "optimizer.offload is true, but sgd without momentum keeps no moments; set "
                "momentum, or offload to false"
            )


@dataclass(frozen=True)
class ScheduleSection(Section):
    """The learning rate over updates: a linear warm-up, then the named shape."""

    name: Literal["cosine", "linear", "wsd", "constant"] = option(
        "cosine and linear fall from the peak; wsd (warm-up, stable, decay) stays there and falls "
        "linearly over the last decay_steps; constant stays",
        default="cosine",
    )
    warmup_steps: int = option("update k of the first ones uses k/warmup_steps", default=0, low=0)
    decay_steps: int | None = option(
        "how many updates the fall takes; 0: the rate does not fall; null: all that are left",
        default=None,
        low=0,
    )
    final_ratio: float = option(
        "the rate after the fall, as a part of the peak", default=0.0, low=0.0, high=1.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "constant" and (self.decay_steps or self.final_ratio):
            raise ValueError(
                "schedule.decay_steps and schedule.final_ratio mean nothing to a constant "
                "schedule; remove them or choose cosine, linear or wsd"
            )
        if self.name == "wsd" and self.decay_steps is None:
            raise ValueError("schedule.decay_steps is missing; wsd needs the length of its decay")


@dataclass(frozen=True)
class MeshSection(Section):
    """How many devices each mesh axis has; one may be -1, whatever is left."""

    data: int = option("copies of the parameters, rows split", default=1, low=-1)
    fsdp: int = option("parameters and rows split", default=-1, low=-1)
    tensor: int = option("heads, mlp and vocabulary split", default=1, low=-1)
    context: int = option("tokens of a row, and parameters, split", default=1, low=-1)
    expert: int = option("experts and rows split", default=1, low=-1)
    cpu_devices: int | None = option(
        "emulate this many devices on the CPU; null: the devices that are there",
        default=None,
        low=1,
        high=4096,
    )
    slice: str | None = option(
        "the TPU slice this run is made for, such as v5e-16, by number of chips: what `fit` proves "
        "and `launch` brings up; on another number of TPU devices `train` refuses to start",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slice is not None:
            slice_named(self.slice)
            if self.cpu_devices is not None:
                raise ValueError("mesh.slice and mesh.cpu_devices both say where to run; keep one")
        for axis, size in self.sizes().items():
            if size == 0:
                raise ValueError(f"mesh.{axis} is 0; it must be a positive integer or -1")
        free = [axis for axis, size in self.sizes().items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"mesh axes {' and '.join(free)} are both -1; only one may be")

    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclass(frozen=True)
class TrainSection(Section):
    """How long, in what pieces, and what is written on the way."""

    steps: int = option("batches to train on", low=1)
    batch_size: int = option("rows of one update, over all devices and micro-batches", low=1)
    sequence_length: int = option("tokens of one row", low=2)
    gradient_accumulation_steps: int = option(
        "micro-batches that one batch is split into, to save memory", default=1, low=1
    )
    seed: int = option(
        "of random weights, adapters and the order of rows", default=0, low=0, high=2**32 - 1
    )
    trainable: tuple[str, ...] | None = option(
        "patterns of weights to train, such as q_proj or !role:norm; null: all the method trains",
        default=None,
    )
    eval_every_steps: int | None = option("null: only at the end", default=None, low=1)
    sample_prompts: tuple[str, ...] = option(
        "at each evaluation the model goes on with these texts, greedily; what it says is in "
        "generations.jsonl and the report",
        default=(),
    )
    sample_max_tokens: int = option("the longest such continuation", default=64, low=1)
    checkpoint_every_steps: int | None = option("null: only at the end", default=None, low=1)
    keep_checkpoints: int = option("the latest ones to keep", default=2, low=1)
    keep_best: int = option(
        "besides the latest, the checkpoints to keep whose evaluation loss was lowest",
        default=0,
        low=0,
    )
    grace_seconds: float | None = option(
        "after SIGTERM the process saves and ends with exit code 75, at the latest this long "
        "afterwards; a spot TPU VM leaves 30 seconds. null: it takes as long as it takes",
        default=25.0,
        above=0.0,
    )
    resume_older: bool = option(
        "when the latest checkpoint is damaged, go on from the latest good one", default=False
    )


@dataclass(frozen=True)
class QuantizationSection(Section):
    """How the frozen base of qlora is stored."""

    scheme: Literal["nf4", "int4", "int8", "fp8"] = option("format of the matrices", default="nf4")
    tile: int | None = option(
        "values of a row that share a scale; null: the scheme's own", default=None, low=1
    )
    skip: tuple[str, ...] | None = option(
        "patterns of weights to leave alone; null: embedding, head and router", default=None
    )
    double_quantization: bool = option(
        "scales of nf4 and int4 in eight bits each: 4.14 instead of 4.5 bits a weight",
        default=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.double_quantization and self.scheme not in ("nf4", "int4"):
            raise ValueError(
                f"quantization.double_quantization is true, but {self.scheme} has too few scales "
                f"for it to save anything; set it to false or choose nf4 or int4"
            )


@dataclass(frozen=True)
class QatSection(Section):
    """Quantization-aware training: matrices are rounded in every product, and so are activations,
    to int8. `llama-jax quantize RUN OUT --scheme qat` then makes the integers."""

    bits: Literal[8, 4] = option("of the matrices, with a scale for each output", default=8)
    backward: Literal["straight_through", "quantized"] = option(
        "gradients through the rounding: as if there were none, or with the operands of both "
        "gradient products rounded to int8 too",
        default="straight_through",
    )
    skip: tuple[str, ...] | None = option(
        "patterns of weights to leave alone; null: embedding, head and router", default=None
    )


@dataclass(frozen=True)
class DpoSection(Section):
    """Direct preference optimization: chosen answers are to become likelier than rejected ones, as
    seen from a reference model."""

    beta: float = option(
        "how strongly the model is held to the reference; rewards are beta times log-ratios",
        default=0.1,
        above=0.0,
    )
    loss: Literal["sigmoid", "ipo", "hinge"] = option(
        "sigmoid: DPO's own; ipo: squared distance of the mean log-ratio of a token from "
        "1 / (2 beta); hinge: SLiC's margin",
        default="sigmoid",
    )
    label_smoothing: float = option(
        "part of the pairs taken to be labelled the wrong way round; of sigmoid only",
        default=0.0,
        low=0.0,
        below=0.5,
    )
    reference: Literal["adapter_off", "cached"] | None = option(
        "adapter_off: the model without its adapters, at every step; cached: the model before the "
        "first step, once for all rows. null: adapter_off with a section lora, else cached",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"dpo.label_smoothing is {self.label_smoothing}, but loss {self.loss} does not "
                f"read it; set it to 0 or choose sigmoid"
            )


@dataclass(frozen=True)
class RampSection(Section):
    """A number that goes linearly from one value to another and stays there."""

    start: float = option("at the first step")
    end: float = option("when it has arrived")
    steps: int | None = option("how many steps it takes; null: the whole run", default=None, low=1)


@dataclass(frozen=True)
class LayerLossSection(Section):
    """Layers of the student drawn to layers of the teacher, beside their distributions."""

    weight: float | RampSection = option(  # noqa: RUF009 - it makes a field
        "of this loss, which is added to the others", low=0.0
    )
    layers: tuple[tuple[int, int], ...] | None = option(
        "pairs of a layer of the student and one of the teacher, from 0; null: all of the "
        "student's, with the teacher's spread evenly and the last for the last",
        default=None,
    )

    def check(self, where: str) -> None:
        """Raises ValueError, naming the field under `where`, for numbers that mean nothing."""
        for name in ("start", "end") if isinstance(self.weight, RampSection) else ():
            if (number := getattr(self.weight, name)) < 0:
                raise ValueError(f"{where}.weight.{name} is {number}; it must be at least 0")
        if self.layers is None:
            return
        if not self.layers:
            raise ValueError(f"{where}.layers is empty; give pairs of layers, or null for all")
        for pair in self.layers:
            if min(pair) < 0:
                raise ValueError(f"{where}.layers holds {list(pair)}; layers are counted from 0")
        ours = [pair[0] for pair in self.layers]
        if len(set(ours)) < len(ours):
            raise ValueError(
                f"{where}.layers pairs a layer of the student twice ({ours}); pair each once"
            )


@dataclass(frozen=True)
class DistillSection(Section):
    """Learning from a teacher: its distributions beside the labels of the rows."""

    teacher: str = option(
        "the model to learn from, quantized or not: a Hugging Face folder, a .gguf file, a "
        "checkpoint folder, smollm2-135m, or a Hub id; it must have the student's tokenizer"
    )
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "what the teacher's weights are held in; null: as stored", default=None
    )
    teacher_architecture: str | None = option(
        "a name of `llama-jax models` whose shape the teacher has: `fit` then works before it is "
        "there, and a teacher of another shape is refused; null: what it says itself",
        default=None,
    )
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = option(
        "forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher); jensen_shannon: "
        "the mean of both to their average",
        default="forward_kl",
    )
    temperature: float | RampSection = option(  # noqa: RUF009 - it makes a field
        "logits of both are divided by it, and the divergence is multiplied by its square",
        default=1.0,
        above=0.0,
    )
    soft_weight: float | RampSection = option(  # noqa: RUF009 - it makes a field
        "of the divergence; the labels' cross entropy has the rest to 1",
        default=0.5,
        low=0.0,
        high=1.0,
    )
    top_k: int | None = option(
        "keep the teacher's outputs for all rows, so many of the likeliest tokens of each and the "
        "probability of all others together, before training, which then needs no teacher; "
        "null: the teacher runs at every step",
        default=None,
        low=1,
    )
    on_policy: float = option(
        "part of the rows whose prompts the student goes on with itself, to be told by the teacher "
        "what it would have said; labels count on the other rows alone",
        default=0.0,
        low=0.0,
        high=1.0,
    )
    on_policy_temperature: float = option("that the student samples at", default=1.0, above=0.0)
    hidden: LayerLossSection | None = option(  # noqa: RUF009 - it makes a field
        "draw hidden states to the teacher's, through learned projections; null: not",
        default=None,
    )
    attention: LayerLossSection | None = option(  # noqa: RUF009 - it makes a field
        "draw attention maps to the teacher's, as learned mixtures of heads; null: not",
        default=None,
    )
    step: Literal["jit", "pmap"] = option(
        "jit: both models lie on the mesh by its rules; pmap: a copy of both on every device, for "
        "meshes of the data axis alone",
        default="jit",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher.strip():
            raise ValueError("distill.teacher is empty; name the model to learn from")
        if self.teacher_architecture is not None:
            preset(self.teacher_architecture, field="distill.teacher_architecture")
        if not self.on_policy and self.on_policy_temperature != 1:
            raise ValueError(
                f"distill.on_policy_temperature is {self.on_policy_temperature}, but "
                f"distill.on_policy is 0, so that the student samples nothing; set on_policy, or "
                f"leave the temperature out"
            )
        if self.hidden is not None:
            self.hidden.check("distill.hidden")
        if self.attention is not None:
            self.attention.check("distill.attention")
        for name, low, high in (("temperature", 1e-6, None), ("soft_weight", 0.0, 1.0)):
            value = getattr(self, name)
            if not isinstance(value, RampSection):
                continue
            for end in ("start", "end"):
                number = getattr(value, end)
                if number < low or (high is not None and number > high):
                    allowed = "above 0" if high is None else f"between {low} and {high}"
                    raise ValueError(f"distill.{name}.{end} is {number}; it must be {allowed}")


@dataclass(frozen=True)
class WandbSection(Section):
    """The run in Weights & Biases too. Its key is read from the environment or from `wandb login`,
    never from a config."""

    project: str = option("the project there")
    entity: str | None = option("the team; null: your own", default=None)
    name: str | None = option("of the run; null: that of the run folder", default=None)
    mode: Literal["online", "offline"] = option(
        "offline: kept in the run folder until `wandb sync`", default="online"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.project.strip():
            raise ValueError("wandb.project is empty; name a project")


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
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    mesh: MeshSection = MeshSection()
    compute: Compute = field(default=Compute(param_dtype="float32"))
    lora: LoraConfig | None = None
    quantization: QuantizationSection | None = None
    qat: QatSection | None = None
    dpo: DpoSection | None = None
    distill: DistillSection | None = None
    wandb: WandbSection | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_method_sections()
        self._check_lengths()
        if self.model.keep_zeros and self.lora is not None:
            raise ValueError(
                "model.keep_zeros is true, but adapters are added to the weights, whose zeros a "
                "merge would fill; train without section lora, or set keep_zeros to false"
            )
        has_eval = bool(self.data.eval or self.data.eval_fraction)
        if self.train.eval_every_steps is not None and not (has_eval or self.train.sample_prompts):
            raise ValueError(
                "train.eval_every_steps is set, but there is nothing to evaluate on; set data.eval "
                "or data.eval_fraction, or train.sample_prompts"
            )
        if not all(self.train.sample_prompts):
            raise ValueError("train.sample_prompts holds an empty prompt; remove it")
        longest = self.train.sample_max_tokens
        if longest != TrainSection.sample_max_tokens and not self.train.sample_prompts:
            raise ValueError(
                f"train.sample_max_tokens is {longest}, but train.sample_prompts is empty; give "
                f"prompts, or leave it out"
            )
        if self.train.keep_best and not has_eval:
            raise ValueError(
                "train.keep_best is set, but there is nothing to evaluate on; set data.eval or "
                "data.eval_fraction"
            )
        if self.train.keep_best:
            self._check_scored()
        if self.optimizer.stochastic_rounding and self.compute.param_dtype != "bfloat16":
            raise ValueError(
                f"optimizer.stochastic_rounding is true, but compute.param_dtype is "
                f"{self.compute.param_dtype or 'that of the weights'}: only bfloat16 weights are "
                f"rounded so; set it to bfloat16, or leave the rounding out"
            )
        self._check_gradient_dtype()
        if not self.output.strip():
            raise ValueError("output is empty; name the run folder")

    def _check_scored(self) -> None:
        """Of checkpoints before the last, some must be evaluated for the best to be told."""
        train = self.train
        evaluated, saved = train.eval_every_steps, train.checkpoint_every_steps
        if evaluated is None or saved is None or math.lcm(evaluated, saved) >= train.steps:
            raise ValueError(
                f"train.keep_best is {train.keep_best}, but no checkpoint before the last step is "
                f"evaluated: train.eval_every_steps is {json.dumps(evaluated)}, "
                f"train.checkpoint_every_steps {json.dumps(saved)}, train.steps {train.steps}. Set "
                f"the first two to one number below train.steps, or keep_best to 0"
            )

    def _check_gradient_dtype(self) -> None:
        compute = self.compute
        if compute.gradient_dtype == "float32":
            return
        if (compute.dtype, compute.param_dtype) != ("bfloat16", "float32"):
            raise ValueError(
                f"compute.gradient_dtype is {compute.gradient_dtype}, which is for float32 weights "
                f"multiplied in bfloat16, but compute.param_dtype is "
                f"{compute.param_dtype or 'that of the weights'} and compute.dtype "
                f"{compute.dtype}; set them so, or leave it out"
            )
        if self.lora is not None or self.qat is not None:
            section = "lora" if self.lora is not None else "qat"
            raise ValueError(
                f"compute.gradient_dtype is {compute.gradient_dtype}, but with a section {section} "
                f"no plain matrix is trained; leave it out"
            )

    def _check_method_sections(self) -> None:
        uses = {
            "lora": ("lora",),
            "qlora": ("lora", "quantization"),
            "qat": ("qat",),
            "dpo": ("dpo",),
        }
        may_use = {
            "qat": ("lora",),
            "dpo": ("lora", "quantization"),
            "distill": ("distill", "lora", "quantization"),
        }
        defaults: tuple[tuple[str, Any], ...] = (
            ("lora", LoraConfig()),
            ("quantization", QuantizationSection()),
            ("qat", QatSection()),
            ("dpo", DpoSection()),
            ("distill", None),
        )
        for name, default in defaults:
            given = getattr(self, name) is not None
            if name in uses.get(self.method, ()) and not given:
                object.__setattr__(self, name, default)
            elif given and name not in uses.get(self.method, ()) + may_use.get(self.method, ()):
                raise ValueError(
                    f"section {name} is set, but method {self.method} does not read it; remove the "
                    f"section or choose another method"
                )
        if self.method in may_use and self.quantization is not None and self.lora is None:
            raise ValueError(
                "section quantization is set, but quantized weights cannot be trained; add a "
                "section lora, whose adapters can"
            )
        if self.dpo is not None:
            self._check_dpo(self.dpo)
        if self.method == "distill":
            self._check_distill()

    def _check_dpo(self, dpo: DpoSection) -> None:
        if dpo.reference is None:
            chosen = "cached" if self.lora is None else "adapter_off"
            object.__setattr__(self, "dpo", dpo.replace(reference=chosen))
        elif dpo.reference == "adapter_off" and self.lora is None:
            raise ValueError(
                "dpo.reference is adapter_off, but without a section lora there is no adapter to "
                "switch off; add one, or choose cached"
            )
        if self.data.packing:
            raise ValueError(
                "data.packing is true, but method dpo compares whole sequences; set it to false"
            )

    def _check_distill(self) -> None:
        if self.distill is None:
            raise ValueError("section distill is missing; method distill needs a distill.teacher")
        if self.distill.top_k is not None:
            if isinstance(self.distill.temperature, RampSection):
                raise ValueError(
                    "distill.temperature follows a schedule, but distill.top_k keeps the teacher's "
                    "outputs at one temperature; give a number, or leave top_k out"
                )
            if self.distill.on_policy:
                raise ValueError(
                    "distill.on_policy needs the teacher's view of what the student just said, "
                    "which distill.top_k cannot keep before; leave one of them out"
                )
        for name in ("hidden", "attention"):
            if getattr(self.distill, name) is None:
                continue
            if self.distill.top_k is not None:
                raise ValueError(
                    f"distill.{name} looks into the teacher at every step, but distill.top_k keeps "
                    f"its outputs alone; leave one of them out"
                )
            if self.mesh.context != 1:
                raise ValueError(
                    f"mesh.context is {self.mesh.context}, but distill.{name} compares whole rows; "
                    f"set context to 1"
                )
        if self.distill.on_policy and self.data.packing:
            raise ValueError(
                "data.packing is true, but distill.on_policy lets the student go on with prompts, "
                "of which a row can hold one; set packing to false"
            )
        if self.distill.on_policy and self.mesh.context != 1:
            raise ValueError(
                f"mesh.context is {self.mesh.context}, but distill.on_policy writes rows token by "
                f"token, which cannot be divided; set context to 1"
            )
        if self.distill.step == "jit":
            return
        if self.optimizer.offload:
            raise ValueError(
                "optimizer.offload is true, but distill.step pmap keeps a copy of everything on "
                "every device; choose distill.step: jit, or set offload to false"
            )
        split = [name for name, size in self.mesh.sizes().items() if name != "data" and size != 1]
        if split:
            raise ValueError(
                f"distill.step is pmap, which copies both models to every device, but mesh."
                f"{split[0]} is {self.mesh.sizes()[split[0]]}; set data: -1 and the other axes of "
                f"the mesh to 1, or choose distill.step: jit"
            )

    def _check_lengths(self) -> None:
        train, schedule = self.train, self.schedule
        if train.batch_size % train.gradient_accumulation_steps:
            raise ValueError(
                f"train.batch_size {train.batch_size} is not a multiple of "
                f"train.gradient_accumulation_steps {train.gradient_accumulation_steps}"
            )
        needed = schedule.warmup_steps + (schedule.decay_steps or 0)
        if needed > train.steps:
            raise ValueError(
                f"schedule.warmup_steps {schedule.warmup_steps} and decay_steps "
                f"{schedule.decay_steps or 0} take {needed} updates, but train.steps is "
                f"{train.steps}; shorten them or train longer"
            )

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
