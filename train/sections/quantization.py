"""The key `quantization` of a run config."""

from dataclasses import dataclass
from typing import Literal

from train.typed import Section, option


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
