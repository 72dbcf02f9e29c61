"""Text and JSON files, read strictly: what is wrong with one comes with its name."""

import dataclasses
import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """Raises ValueError naming a file that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def check_characters(text: str, what: str = "the text") -> None:
    """Raises ValueError for half a surrogate pair, as JSON can spell it, and as bytes in an
    argument become that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a surrogate pair, which is no character: "
            f"{text[error.start]!r} at character {error.start}"
        ) from error


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """What a JSON text says. Raises ValueError for anything else, also where it is nested deeper
    than Python reads. unique: a repeated key is an error, where Python keeps the last."""
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} appears twice")
        result[name] = value
    return result


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a repeated key is an error."""
    text = read_text(path)
    try:
        value = parse_json(text, unique=True)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def to_number(name: str, value: Any) -> Any:
    """As a float where it is an integer: 1000000 and 1000000.0 are one value."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value  # the config refuses what is not a number
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {str(value)[:20]}..., more than any number may be") from None


def is_equal(value: Any, allowed: Any) -> bool:
    # True == 1 in Python, but a boolean is not a number in a config.
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def field_names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
