"""What compressed-tensors says of weights, or of inputs: QuantizationArgs of that package.

Reading is strict, as in `compressed_config.py`; absent fields have the package's defaults.
"""

from dataclasses import dataclass
from typing import Any

from llama_jax.formats.json_fields import is_equal, shorten

SUPPORTED = (
    "supported are symmetric weights in 8 bits (int or float) and 4 bits (int), with a scale for a "
    "tensor, channel or group; inputs as they are, int of 8 bits (dynamic by token, or static by "
    "tensor, with one weight scale for each output), or float of 8 bits beside float weights"
)
# How scales were found: the file has the result.
_HOW_FOUND = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_ARGUMENTS = {
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "dynamic",
    "actorder",
    "block_structure",
}
_REFUSED = {
    "symmetric": "zero points, weight_zero_point and input_zero_point, are not",
    # `weight` reordered columns while it calibrated, and put them back.
    "actorder": "columns in an order of their own, weight_g_idx, are not",
    "block_structure": "scales of blocks are not",
}


@dataclass(frozen=True)
class Arguments:
    """What is said of weights or of inputs, at `where` in the settings."""

    where: str
    num_bits: int
    is_float: bool
    strategy: str
    group_size: int | None
    dynamic: bool

    def __str__(self) -> str:
        kind = "float" if self.is_float else "int"
        grouped = f", group_size {self.group_size}" if self.strategy == "group" else ""
        dynamic = ", dynamic" if self.dynamic else ""
        return f"{self.where} ({kind} of {self.num_bits} bits by {self.strategy}{grouped}{dynamic})"


def read_arguments(where: str, given: Any) -> Arguments | None:
    """With what the package compressed-tensors takes for absent fields."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {shorten(given)}; it must be an object with num_bits, type")
    check_known(f"{where}.", given, _ARGUMENTS | _HOW_FOUND)
    values = {name: value for name, value in given.items() if value is not None}

    def read(name: str, default: Any, *allowed: Any) -> Any:
        value = values.get(name, default)
        value = value.lower() if isinstance(value, str) else value
        if not any(is_equal(value, each) for each in allowed):
            stated = ", ".join(shorten(each) for each in allowed)
            note = _REFUSED.get(name, SUPPORTED)
            raise ValueError(f"{where}.{name} is {shorten(value)}, supported are {stated} ({note})")
        return value

    read("symmetric", True, True)
    read("actorder", None, None, False, "weight", "static")
    read("block_structure", None, None)
    size = values.get("group_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < -1):
        raise ValueError(f"{where}.group_size is {shorten(size)}; it must be a positive integer")
    inferred = {None: "tensor", -1: "channel"}.get(size, "group")
    strategy = read("strategy", inferred, "tensor", "channel", "group", "token")
    if strategy == "group" and (size is None or size < 1):
        raise ValueError(f"{where}.group_size is {shorten(size)}; strategy group needs it positive")
    return Arguments(
        where,
        num_bits=read("num_bits", 8, 8, 4),
        is_float=read("type", "int", "int", "float") == "float",
        strategy=strategy,
        group_size=size,
        dynamic=read("dynamic", False, True, False),
    )


def check_known(where: str, given: dict[str, Any], known: set[str]) -> None:
    unknown = [
        f"{where}{name} = {shorten(value)}"
        for name, value in given.items()
        if name not in known and value is not None
    ]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is unknown; known are {', '.join(sorted(known))}")
