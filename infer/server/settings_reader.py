"""Settings from flags, then environment, then a YAML file, then defaults."""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer.server.settings import Secret, Settings, Tenant, flag_fields
from llama_jax.formats.json_fields import read_text

PREFIX = "LLAMA_JAX_"
# Variables of that prefix which other parts of the project read, and those that Kubernetes makes
# for a Service called llama-jax.
_OTHERS = re.compile(
    r"LLAMA_JAX_(CACHE_DIR|COORDINATOR_ADDRESS|PROCESS_COUNT|PROCESS_ID"
    r"|(\w+_)?SERVICE_(HOST|PORT(_\w+)?)|(\w+_)?PORT_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)"
)


def read_settings(
    flags: Mapping[str, Any],
    *,
    config: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Settings from texts and values of flags (None is not given), variables and a file.

    Raises ValueError naming the flag, variable or key that is unknown or of the wrong type.
    """
    values: dict[str, Any] = {}
    if config is not None:
        values.update(_from_yaml(Path(config)))
    values.update(_from_environment(os.environ if environment is None else environment))
    values.update({name: value for name, value in flags.items() if value is not None})
    return Settings(**values)


def _from_yaml(path: Path) -> dict[str, Any]:
    from llama_jax.formats.yaml_text import parse_yaml

    loaded = parse_yaml(read_text(path), str(path))
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must be a mapping of settings, not a {type(loaded).__name__}")
    known = {each.name: each.type for each in dataclasses.fields(Settings)}
    values = {}
    for name, value in loaded.items():
        if name not in known:
            raise ValueError(f"{path} has no setting {name!r}{_nearest(name, known)}")
        if value is None and name in ("api_key", "admin_key", "tenants"):
            raise ValueError(f"{path}: {name} is empty; leave it out to serve without")
        if value is None:
            continue  # as if it were absent
        if name == "tenants":
            values[name] = _tenants(str(path), value)
        else:
            values[name] = _typed(f"{path}: {name}", value, _type_of(name))
    return values


def _tenants(path: str, value: Any) -> tuple[Tenant, ...]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{path}: tenants must be a list of mappings with name and key")
    known = [each.name for each in dataclasses.fields(Tenant)]
    tenants = []
    for each in value:
        for key in each:
            if key not in known:
                raise ValueError(f"{path}: tenants has no field {key!r}{_nearest(key, known)}")
        missing = {"name", "key"} - set(each)
        if missing:
            raise ValueError(f"{path}: tenants: {' and '.join(sorted(missing))} is missing")
        if not isinstance(each["key"], str):
            raise ValueError(f"{path}: the key of tenant {each['name']!r} must be a text in quotes")
        tenants.append(Tenant(**{**each, "key": Secret(each["key"])}))
    return tuple(tenants)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    known = {PREFIX + each.name.upper(): each.name for each in flag_fields()}
    known[f"{PREFIX}MODELS"] = "models"
    values = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        if variable in known:
            values[known[variable]] = from_text(variable, text, known[variable])
        elif not _OTHERS.fullmatch(variable):
            raise ValueError(f"no setting is called {variable}{_nearest(variable, known)}")
    return values


def from_text(where: str, text: str, name: str) -> Any:
    """The value of setting `name` that a flag or variable spells."""
    kind = _type_of(name)
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{where} is {text!r}; it must be true or false")
        return text.lower() in ("true", "1")
    if kind is Secret:
        if not text:
            raise ValueError(f"{where} is empty; leave it out, or give a key")
        return Secret(text)
    if kind is str:
        return text
    try:
        return _typed(where, kind(text), kind)
    except ValueError:
        noun = "an integer" if kind is int else "a finite number"
        raise ValueError(f"{where} is {text!r}; it must be {noun}") from None


def _type_of(name: str) -> type:
    """The type of a setting, less the None that it may be."""
    hint = typing.get_type_hints(Settings)[name]
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    return typing.get_origin(hint) or hint


def _typed(where: str, value: Any, kind: Any) -> Any:
    if kind is tuple:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{where} is {value!r}; it must be a list of texts")
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    wanted = str if kind is Secret else kind
    if type(value) is not wanted or (isinstance(value, float) and not math.isfinite(value)):
        shown = "***" if kind is Secret else repr(value)
        raise ValueError(f"{where} is {shown}; it must be of type {wanted.__name__}")
    return Secret(value) if kind is Secret else value


def _nearest(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(sorted(known))})"
