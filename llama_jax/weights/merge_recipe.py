"""What a merge recipe may say: methods, their inputs and numbers, each checked.

A recipe is a mapping, usually a YAML file. Every key belongs to the chosen method or to all of
them; anything else is an error.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_jax.config import FLOAT_DTYPES, check_keys, is_finite_number
from llama_jax.paths import to_path

_COMMON = ("method", "dtype", "vocabulary", "tokenizer")
# The first input is the one the result takes its shape and its config from.
_INPUTS: dict[str, tuple[str, ...]] = {
    "chat_vector": ("target", "base", "chat"),
    "task_arithmetic": ("base", "models"),
    "linear": ("models",),
    "slerp": ("models",),
    "ties": ("base", "models"),
    "dare": ("base", "models"),
}
_NUMBERS: dict[str, tuple[str, ...]] = {
    "chat_vector": ("ratio",),
    "task_arithmetic": ("scale", "normalize", "output"),
    "linear": ("normalize",),
    "slerp": ("t",),
    "ties": ("density", "scale", "normalize"),
    "dare": ("density", "scale", "normalize", "elect_sign", "seed"),
}
METHODS = tuple(_INPUTS)
OUTPUTS = ("model", "adapter")
VOCABULARIES = ("refuse", "shared_rows", "keep")


@dataclass(frozen=True)
class Entry:
    """One of `models`: what is merged, how strongly, and, of a task vector, how much of it."""

    model: str
    weight: float = 1.0
    density: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    inputs: (name in the recipe, model), the first of which gives the result its shape, its config
    and, unless `tokenizer` names another, its tokenizer. entries: those of them that `models`
    lists, in order. ratio of chat_vector; t of slerp; scale multiplies the sum of task vectors;
    normalize divides by the sum of weights; elect_sign is TIES' vote after DARE's drop. output:
    whether a sum of adapters is written as a model, or as an adapter for the same base.
    """

    method: str
    inputs: tuple[tuple[str, str], ...]
    entries: tuple[Entry, ...] = ()
    ratio: float = 1.0
    t: float = 0.5
    scale: float = 1.0
    normalize: bool = False
    elect_sign: bool = False
    seed: int = 0
    output: str = "model"
    dtype: str | None = None
    vocabulary: str = "refuse"
    tokenizer: str | None = None


def read_recipe(values: Any, source: str) -> Recipe:
    """The recipe that a mapping describes; `source` names it in errors.

    Raises ValueError naming the key for anything missing, unknown, of another method, or out of
    range.
    """
    try:
        return _recipe(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _recipe(values: Any) -> Recipe:
    if not isinstance(values, Mapping):
        raise ValueError(f"a recipe is a mapping with the key `method` and more, not {values!r}")
    values = dict(values)
    method = _choice("method", _required(values, "method"), METHODS)
    _check_keys(method, values)
    inputs: list[tuple[str, str]] = []
    entries: tuple[Entry, ...] = ()
    for name in _INPUTS[method]:
        if name == "models":
            entries = _entries(method, values)
            inputs += [(f"models[{i}]", entry.model) for i, entry in enumerate(entries)]
        else:
            inputs.append((name, _model(name, _required(values, name))))
    vocabulary = str(values.get("vocabulary", "refuse")).replace(" ", "_").replace("-", "_")
    recipe = Recipe(
        method=method,
        inputs=tuple(inputs),
        entries=entries,
        vocabulary=_choice("vocabulary", vocabulary, VOCABULARIES),
        tokenizer=_optional_model("tokenizer", values.get("tokenizer")),
        dtype=_dtype(values.get("dtype")),
        scale=_number("scale", values.get("scale", 1.0)),
        seed=_seed(values.get("seed", 0)),
        output=_choice("output", values.get("output", "model"), OUTPUTS),
        # As the papers and mergekit have it: weights of whole models, and of voted task vectors,
        # are shares; weights of a plain sum of task vectors are not.
        normalize=_flag("normalize", values.get("normalize", method in ("linear", "ties"))),
        elect_sign=_flag("elect_sign", values.get("elect_sign", False)),
        ratio=_number("ratio", _required(values, "ratio")) if method == "chat_vector" else 1.0,
        t=_number("t", _required(values, "t"), low=0.0, high=1.0) if method == "slerp" else 0.5,
    )
    if recipe.normalize and entries and sum(entry.weight for entry in entries) == 0:
        raise ValueError("the weights of models add up to 0, which normalize divides by")
    if recipe.output == "adapter":
        for name in ("vocabulary", "tokenizer"):
            if name in values:
                raise ValueError(
                    f"{name} is set, but output is an adapter, which has none; remove it"
                )
    return recipe


def _check_keys(method: str, values: dict[str, Any]) -> None:
    own = (*_INPUTS[method], *_NUMBERS[method])
    every = {name for table in (_INPUTS, _NUMBERS) for names in table.values() for name in names}
    for name in values:
        if name in every and name not in own:
            raise ValueError(
                f"{name} is set, but method {method} does not read it (it reads {', '.join(own)}); "
                f"remove it or choose another method"
            )
    check_keys(f"a recipe of method {method}", values, [*_COMMON, *own])


def _entries(method: str, values: dict[str, Any]) -> tuple[Entry, ...]:
    listed = _required(values, "models")
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(f"models is {listed!r}; give a list of models")
    sparse = method in ("ties", "dare")
    allowed = {"slerp": ("model",), "ties": ("model", "weight", "density")}
    allowed["dare"] = allowed["ties"]
    entries = []
    for number, item in enumerate(listed):
        name = f"models[{number}]"
        item = dict(item) if isinstance(item, Mapping) else {"model": item}
        check_keys(name, item, list(allowed.get(method, ("model", "weight"))))
        density = item.get("density", values.get("density"))
        if sparse and density is None:
            raise ValueError(f"density is missing: the part of {name} that {method} keeps")
        entries.append(
            Entry(
                _model(f"{name}.model", _required(item, "model", owner=name)),
                _number(f"{name}.weight", item.get("weight", 1.0)),
                _number(f"{name}.density", density, low=0.0, high=1.0) if sparse else None,
            )
        )
    has_own = [isinstance(item, Mapping) and item.get("density") is not None for item in listed]
    if values.get("density") is not None and all(has_own):
        raise ValueError("density is set, but each of models has its own; remove it")
    if method == "slerp" and len(entries) != 2:
        raise ValueError(f"models lists {len(entries)}; slerp goes between exactly two")
    if method == "dare" and any(not entry.density for entry in entries):
        raise ValueError("density is 0; dare divides by it, so it must be above 0")
    return tuple(entries)


def _required(values: dict[str, Any], name: str, owner: str = "the recipe") -> Any:
    if values.get(name) is None:
        raise ValueError(f"{owner} has no {name}")
    return values[name]


def _model(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}; it must name a model or a PEFT adapter")
    return str(to_path(value)) if value.startswith("~") else value


def _optional_model(name: str, value: Any) -> str | None:
    return None if value is None else _model(name, value)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(choices)}{hint}")
    return value


def _dtype(value: Any) -> str | None:
    return None if value is None else _choice("dtype", value, FLOAT_DTYPES)


def _number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    if not is_finite_number(value) or not low <= value <= high:
        bounds = "" if high == math.inf else f" between {low} and {high}"
        raise ValueError(f"{name} is {value!r}; it must be a finite number{bounds}")
    return float(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"seed is {value!r}; it must be an integer between 0 and 2**32 - 1")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value
