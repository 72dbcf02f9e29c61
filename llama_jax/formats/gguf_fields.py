"""The `llama.*` metadata of a GGUF file: typed look-up that notes every problem, and entries."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGUFValueType

from llama_jax.formats.gguf_header import shortest_float

PREFIX = "llama."

Default = TypeVar("Default")


@dataclass(frozen=True)
class Entry:
    """One metadata entry; `item_kind` is the type of an array's elements."""

    key: str
    kind: GGUFValueType
    value: Any
    item_kind: GGUFValueType | None = None


def text_entry(name: str, value: str) -> Entry:
    return Entry(PREFIX + name, GGUFValueType.STRING, value)


def uint32_entry(name: str, value: int) -> Entry:
    return Entry(PREFIX + name, GGUFValueType.UINT32, value)


def float32_entry(name: str, value: float) -> Entry:
    """Holds `value` as it will be read back."""
    return Entry(PREFIX + name, GGUFValueType.FLOAT32, shortest_float(value))


class Fields:
    """Look-up of `llama.*` keys. A key that is missing, of the wrong type or never asked for is
    noted, and `finish` raises for all of them at once."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._values = {
            key.removeprefix(PREFIX): value
            for key, value in metadata.items()
            if key.startswith(PREFIX)
        }
        self._asked: set[str] = set()
        self._problems: list[str] = []

    def problem(self, name: str, text: str) -> None:
        self._problems.append(f"{PREFIX}{name} {text}")

    def skip(self, name: str) -> None:
        self._asked.add(name)

    def integer(self, name: str, default: int | None = None) -> int:
        """A count. Files may give one for each layer; they must agree then. Without a default the
        key must be there; 1 stands in until `finish` raises."""
        value = self._get(name, default)
        if isinstance(value, np.ndarray) and value.size and np.all(value == value[0]):
            value = value[0].item()
        if isinstance(value, np.ndarray):
            self.problem(name, f"differs by layer: {_short(value.tolist())}")
        elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            if value is not None:
                self.problem(
                    name, f"is {_short(value)}; it must be an integer from 0 to 2147483647"
                )
        else:
            return value
        return 1

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            if value is not None:
                self.problem(name, f"is {_short(value)}; it must be a number")
            return 1.0
        return float(value)

    def text(self, name: str, default: Default) -> str | Default:
        self.skip(name)
        value = self._values.get(name, default)
        if value is not default and not isinstance(value, str):
            self.problem(name, f"is {_short(value)}; it must be a string")
            return default
        return value

    def has(self, name: str) -> bool:
        return name in self._values

    def require(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Notes a key whose value would change what the model computes."""
        self.skip(name)
        if name not in self._values:
            return
        value = self._values[name]
        if not any(type(value) is type(item) or _are_numbers(value, item) for item in allowed) or (
            value not in allowed
        ):
            stated = " or ".join(repr(item) for item in allowed)
            self.problem(name, f"is {_short(value)}; only {stated} is supported")

    def finish(self) -> None:
        for name in self._values:
            if name not in self._asked:
                self.problem(
                    name,
                    f"= {_short(self._values[name])} is unknown and could change what the model "
                    f"computes",
                )
        if self._problems:
            raise ValueError("; ".join(self._problems))

    def _get(self, name: str, default: Any) -> Any:
        self.skip(name)
        value = self._values.get(name, default)
        if value is None:
            self.problem(name, "is missing")
        return value


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
