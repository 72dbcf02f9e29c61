"""The key `dpo` of a run config."""

from dataclasses import dataclass
from typing import Literal

from train.typed import Section, option


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
