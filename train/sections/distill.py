"""The key `distill` of a run config, with numbers that change and losses of layers."""

from dataclasses import dataclass
from typing import Literal

from llama_jax.presets import preset
from train.typed import Section, option


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
        self._check_ramps()
        if self.top_k is not None:
            self._check_kept()

    def _check_ramps(self) -> None:
        for name, low, high in (("temperature", 1e-6, None), ("soft_weight", 0.0, 1.0)):
            value = getattr(self, name)
            if not isinstance(value, RampSection):
                continue
            for end in ("start", "end"):
                number = getattr(value, end)
                if number < low or (high is not None and number > high):
                    allowed = "above 0" if high is None else f"between {low} and {high}"
                    raise ValueError(f"distill.{name}.{end} is {number}; it must be {allowed}")

    def _check_kept(self) -> None:
        """What the teacher's kept outputs cannot give."""
        if isinstance(self.temperature, RampSection):
            raise ValueError(
                "distill.temperature follows a schedule, but distill.top_k keeps the teacher's "
                "outputs at one temperature; give a number, or leave top_k out"
            )
        if self.on_policy:
            raise ValueError(
                "distill.on_policy needs the teacher's view of what the student just said, "
                "which distill.top_k cannot keep before; leave one of them out"
            )
        for name in ("hidden", "attention"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"distill.{name} looks into the teacher at every step, but distill.top_k keeps "
                    f"its outputs alone; leave one of them out"
                )
