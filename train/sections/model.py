"""The key `model` of a run config."""

from dataclasses import dataclass, field
from typing import Any, Literal

from llama_jax.presets import preset
from train.typed import Section, option


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
