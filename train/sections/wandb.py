"""The key `wandb` of a run config."""

from dataclasses import dataclass
from typing import Literal

from train.typed import Section, option


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
