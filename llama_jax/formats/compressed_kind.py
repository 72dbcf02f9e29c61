"""How compressed-tensors writes a matrix: what its group in config.json says, and its tensors.

    int-quantized     `weight` int8 [out, in]
    float-quantized   `weight` float8 [out, in]
    pack-quantized    `weight_packed` int32, codes plus half their range, the first in the lowest
                      bits; `weight_shape`

Beside each lies `weight_scale`, [out, 1] or [out, tiles], and `input_scale` where that of
activations is fixed. `compressed_tensors.py` writes such folders; `compressed_config.py` and
`compressed_reader.py` read them.
"""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

METHOD = "compressed-tensors"
INT_FORMAT, FLOAT_FORMAT, PACKED_FORMAT = "int-quantized", "float-quantized", "pack-quantized"
# Those that are read. The first versions of the package said `naive-quantized` for both of the
# formats that hold values as they are, whose tensors are laid out alike.
FORMATS = (INT_FORMAT, FLOAT_FORMAT, "naive-quantized", PACKED_FORMAT)
# What turns bytes of two's complement codes into codes plus half their range, and back: the highest
# bit of each code is turned over.
HIGH_BITS = {8: np.uint8(0x80), 4: np.uint8(0x88)}


@dataclass(frozen=True)
class Kind:
    """What a matrix holds. tile: how many values of a row share a scale, None for all;
    activations: `dynamic`, `static` or None."""

    bits: int
    is_float: bool
    tile: int | None
    activations: str | None

    @property
    def format(self) -> str:
        """The one it is written in."""
        if self.is_float:
            return FLOAT_FORMAT
        return INT_FORMAT if self.bits == 8 and self.activations else PACKED_FORMAT

    @property
    def code_dtype(self) -> np.dtype[Any]:
        """Of codes that are not packed."""
        return np.dtype(ml_dtypes.float8_e4m3fn if self.is_float else np.int8)

    def to_config(self) -> dict[str, Any]:
        """A group of `quantization_config`, for all linear layers that are not ignored."""
        weights = {
            "num_bits": self.bits,
            "type": "float" if self.is_float else "int",
            "symmetric": True,
            "dynamic": False,
            "strategy": "channel" if self.tile is None else "group",
            "group_size": self.tile,
        }
        inputs = None
        if self.activations is not None:
            is_dynamic = self.activations == "dynamic"
            inputs = {
                "num_bits": 8,
                "type": weights["type"],
                "symmetric": True,
                "dynamic": is_dynamic,
                "strategy": "token" if is_dynamic else "tensor",
            }
        return {
            "targets": ["Linear"],
            "format": self.format,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
        }

    def num_tiles(self, size: int) -> int:
        """How many scales a row of `size` values has."""
        return 1 if self.tile is None else size // self.tile

    def num_words(self, size: int) -> int:
        """How many words of 32 bits a packed row of `size` values takes."""
        return math.ceil(size * self.bits / 32)
