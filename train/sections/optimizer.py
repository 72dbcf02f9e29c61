"""The key `optimizer` of a run config."""

from dataclasses import dataclass
from typing import Literal

from train.typed import Section, option

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
