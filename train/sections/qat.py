"""The key `qat` of a run config."""

from dataclasses import dataclass
from typing import Literal

from train.typed import Section, option


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
