"""Frozen dataclasses as typed configuration: from mappings, to mappings, and as a JSON Schema.

A section states its fields once, with `option`; parsing, checking and the schema are derived.
Nothing is guessed: an unknown key, a value of another type and a number out of range are errors
that name the field with its full path.
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, Union, get_args, get_origin

from llama_jax.config import check_keys


def option(
    doc: str,
    *,
    default: Any = dataclasses.MISSING,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with its description and, for numbers, its bounds: low <= x <= high, above < x."""
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"doc": doc, **bounds})


@dataclass(frozen=True)
class Section:
    """A part of a configuration whose values are checked against their annotations."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            where = f"{_title(type(self))}{spec.name}"
            value = convert(hints[spec.name], getattr(self, spec.name), where)
            _check_bounds(spec, value, where)
            object.__setattr__(self, spec.name, value)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


def _title(cls: type) -> str:
    """`TrainSection` -> `train.`; the run itself has no prefix."""
    name = cls.__name__.removesuffix("Section")
    return f"{name.lower()}." if name != cls.__name__ else ""


def _check_bounds(spec: dataclasses.Field[Any], value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    meta = spec.metadata
    limits = {
        "at least": (meta.get("low"), lambda bound: value >= bound),
        "at most": (meta.get("high"), lambda bound: value <= bound),
        "above": (meta.get("above"), lambda bound: value > bound),
        "below": (meta.get("below"), lambda bound: value < bound),
    }
    for words, (bound, holds) in limits.items():
        if bound is not None and not holds(bound):
            raise ValueError(f"{where} is {value!r}; it must be {words} {bound}")


def from_dict(cls: type[Any], values: Any, where: str = "", start: Any = None) -> Any:
    """An instance of the dataclass `cls`; keys left out come from `start` or from the class."""
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    name = where or "the configuration"
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is {values!r}; it must be a mapping of fields to values")
    check_keys(name, dict(values), [spec.name for spec in fields])
    given = {}
    for spec in fields:
        path = f"{where}.{spec.name}" if where else spec.name
        if spec.name in values:
            begin = spec.default if _has_start(spec) else None
            given[spec.name] = convert(hints[spec.name], values[spec.name], path, begin)
            _check_bounds(spec, given[spec.name], path)
        elif start is not None:
            given[spec.name] = getattr(start, spec.name)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            doc = spec.metadata.get("doc")
            raise ValueError(f"{path} is missing{f': {doc}' if doc else ''}")
    return cls(**given)


def _has_start(spec: dataclasses.Field[Any]) -> bool:
    """Whether fields left out come from the default of `spec`. A section fills them in by itself,
    and may do so by what is given."""
    return dataclasses.is_dataclass(spec.default) and not isinstance(spec.default, Section)


def convert(hint: Any, value: Any, where: str, start: Any = None) -> Any:
    """`value` as the annotation `hint` wants it, or ValueError naming `where`.

    An integer is taken for a float and a lone value for a tuple of one; nothing else changes type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where, start)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where, start)
    if origin is Literal:
        # True equals 1: compare types too.
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ValueError(
                f"{where} is {value!r}; allowed are {', '.join(str(a) for a in arguments)}"
            )
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; it must be a mapping")
        key_hint, value_hint = arguments
        return {
            convert(key_hint, key, f"a key of {where}"): convert(value_hint, item, f"{where}.{key}")
            for key, item in value.items()
        }
    return _convert_scalar(hint, value, where)


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str, start: Any) -> Any:
    if value is None and type(None) in arguments:
        return None
    if isinstance(value, Mapping):
        # Of a mapping only a section can be meant: its own complaint is the one to hear.
        sections = tuple(choice for choice in arguments if dataclasses.is_dataclass(choice))
        arguments = sections or arguments
    problems = []
    for choice in arguments:
        if choice is type(None):
            continue
        try:
            return convert(choice, value, where, start)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; or ".join(problems))


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        choices = (arguments[0], *get_args(arguments[0]))
        if isinstance(value, Mapping) and not any(map(dataclasses.is_dataclass, choices)):
            raise ValueError(f"{where} is {value!r}; it must be a list")
        items = list(value) if isinstance(value, list | tuple) else [value]
        return tuple(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if not isinstance(value, list | tuple) or len(value) != len(arguments):
        raise ValueError(f"{where} is {value!r}; it must be a list of {len(arguments)} values")
    return tuple(
        convert(hint, item, f"{where}[{i}]")
        for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


# No count or number is larger as an integer; one that is would overflow far from its name.
_MOST = 2**32 - 1


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, int) and abs(value) > _MOST:
        raise ValueError(f"{where} is {str(value)[:20]}…; it must be at most {_MOST}")
    if hint is float and is_number:
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value!r}; it must be a finite number")
        return float(value)
    if hint is int and isinstance(value, bool):
        value_fits = False
    else:
        value_fits = isinstance(value, hint)
    if not value_fits:
        quoted = " (remove the quotes?)" if isinstance(value, str) and hint is not str else ""
        raise ValueError(f"{where} is {value!r}; it must be {_KINDS[hint]}{quoted}")
    return value


def to_dict(section: Any) -> Any:
    """JSON-ready values that `from_dict` turns back into an equal object."""
    if dataclasses.is_dataclass(section):
        return {f.name: to_dict(getattr(section, f.name)) for f in dataclasses.fields(section)}
    if isinstance(section, list | tuple):
        return [to_dict(item) for item in section]
    if isinstance(section, Mapping):
        return {key: to_dict(item) for key, item in section.items()}
    return section


def json_schema(cls: type[Any], start: Any = None) -> dict[str, Any]:
    """JSON Schema (2020-12) of the mappings that `from_dict(cls, …)` takes, `start` as there."""
    hints, documented = typing.get_type_hints(cls), _documented(cls)
    properties, required = {}, []
    for spec in dataclasses.fields(cls):
        default = spec.default if start is None else getattr(start, spec.name)
        entry = _hint_schema(hints[spec.name], default if _has_start(spec) else None)
        meta = spec.metadata
        if doc := meta.get("doc") or documented.get(spec.name):
            entry["description"] = doc
        for name, keyword in (
            ("low", "minimum"),
            ("high", "maximum"),
            ("above", "exclusiveMinimum"),
            ("below", "exclusiveMaximum"),
        ):
            if meta.get(name) is not None:
                entry[keyword] = meta[name]
        if default is not dataclasses.MISSING:
            if not dataclasses.is_dataclass(default):
                entry["default"] = to_dict(default)
        elif spec.default_factory is dataclasses.MISSING:
            required.append(spec.name)
        properties[spec.name] = entry
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return {**schema, "additionalProperties": False}


def _documented(cls: type[Any]) -> dict[str, str]:
    """What a docstring says of fields: paragraphs that begin `name: ` or `name and name: `, whose
    further lines are indented."""
    found: dict[str, str] = {}
    doc = inspect.cleandoc(cls.__doc__ or "")
    entries = re.findall(r"^(\w+(?:(?:, | and )\w+)*): (.*(?:\n +.*)*)", doc, re.MULTILINE)
    for names, text in entries:
        found |= dict.fromkeys(re.split(", | and ", names), " ".join(text.split()))
    return found


def _hint_schema(hint: Any, start: Any = None) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return json_schema(hint, start)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        choices = [_hint_schema(choice) for choice in arguments]
        return {"anyOf": choices}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            item = _hint_schema(arguments[0])
            return {"anyOf": [{"type": "array", "items": item}, item]}
        items = [_hint_schema(argument) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _hint_schema(arguments[1])}
    if hint is Any:
        return {}
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {"type": names[hint]}
