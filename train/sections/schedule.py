"""The key `schedule` of a run config."""

from dataclasses import dataclass
from typing import Literal

from train.typed import Section, option


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
        if self.decay_steps == 0 and self.final_ratio:
            raise ValueError(
                f"schedule.final_ratio is {self.final_ratio}, but decay_steps is 0, so that the "
                f"rate does not fall; leave one of them out"
            )
        if self.name == "wsd" and self.decay_steps is None:
            raise ValueError("schedule.decay_steps is missing; wsd needs the length of its decay")
