"""What one rendering of a template from strangers may spend: steps, seconds, and sizes of values.

Every loop turn, call, range and long value is charged to a budget, and a clock stops the rest.
Values are held to a size before they are made where that can be foretold. The size of a list counts
what it shares each time, as text, comparison and hash go through it.
"""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

MAX_STEPS = 200_000
MAX_SECONDS = 20.0
MAX_CHARACTERS = 10_000_000
# A larger number than any template needs as width, count or repetition.
MAX_NUMBER = 1_000_000
MAX_BITS = 4096
MAX_DEPTH = 100

_CHARACTERS_A_STEP = 1000
# About the memory of an item of a list, and of a list or dict itself.
CHARACTERS_AN_ITEM = 50
_CHARACTERS_A_LIST = 200
STEPS_A_CALL = 5

_steps_left: ContextVar[int] = ContextVar("steps left to the template")
_deadline: ContextVar[float] = ContextVar("when the template is stopped")
# By id: what a template is given outlives the rendering and does not change.
_given_sizes: ContextVar[dict[int, int]] = ContextVar("sizes of what the template is given")


class TemplateError(ValueError):
    """A chat template, or the messages given to it, cannot be rendered. The message says why."""


@contextmanager
def budget(given: Any) -> Iterator[None]:
    """Everything a template may spend on one rendering of the values `given`."""
    steps = _steps_left.set(MAX_STEPS)
    deadline = _deadline.set(time.monotonic() + MAX_SECONDS)
    sizes = _given_sizes.set({})
    try:
        _remember(given, _given_sizes.get())
        yield
    finally:
        _given_sizes.reset(sizes)
        _deadline.reset(deadline)
        _steps_left.reset(steps)


def charge(steps: int = 1) -> None:
    left = _steps_left.get() - steps
    if left < 0:
        raise TemplateError(f"chat template takes more than {MAX_STEPS} steps")
    if time.monotonic() > _deadline.get():
        raise TemplateError(f"chat template takes more than {MAX_SECONDS:.0f} seconds")
    _steps_left.set(left)


def bounded(value: Any) -> Any:
    """`value`, charged by its length, unless it is larger than a template may make it."""
    length = len(value) if isinstance(value, _SIZED) else 0
    if isinstance(value, str):
        check_length(length)
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TemplateError(f"chat template makes a number of over {MAX_BITS} bits")
    elif not length and isinstance(value, Iterator):
        return map(bounded, value)
    else:
        check_length(size_of(value))
    charge(length // _CHARACTERS_A_STEP)
    return value


def check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise TemplateError(f"chat template makes a value longer than {MAX_CHARACTERS}")


_NONE: dict[str, str] = {}
_SIZED = (str, list, tuple, dict)
_LISTS = (list, tuple, dict, type(_NONE.keys()), type(_NONE.values()), type(_NONE.items()))


def size_of(value: Any, depth: int = 0) -> int:
    """About the length of `value` as text, or some number over the longest allowed."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    if not isinstance(value, _LISTS):
        return len(repr(value))
    if depth > MAX_DEPTH:
        raise TemplateError(f"chat template nests values deeper than {MAX_DEPTH}")
    given = _given_sizes.get()
    if id(value) in given:
        return given[id(value)]
    size = _CHARACTERS_A_LIST
    for part in _items(value):
        size += CHARACTERS_AN_ITEM
        if isinstance(part, str):
            size += len(part)
        else:
            size += given.get(id(part)) or size_of(part, depth + 1)
        if size > MAX_CHARACTERS:
            break
    return size


def _items(value: Any) -> Iterable[Any]:
    return chain(value, value.values()) if isinstance(value, dict) else value


def _remember(value: Any, sizes: dict[int, int]) -> None:
    """Write the sizes of all lists and dicts in `value`, the innermost first."""
    if isinstance(value, _LISTS):
        for part in _items(value):
            _remember(part, sizes)
        sizes[id(value)] = size_of(value)


def check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise TemplateError(f"chat template passes the number {value:.6g}, over {MAX_NUMBER}")


def check_product(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        check_numbers([left])
        if isinstance(right, int | float) and abs(right) > 64:
            raise TemplateError("chat template raises to a power over 64")
        return
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str | list | tuple):
            check_length(max(size_of(value), 1) * count)
            return


def check_growth(name: str, value: Any, arguments: list[Any]) -> None:
    """Foretell the length of what a text method or filter of this name makes."""
    if name != "default":
        check_numbers(arguments)
    texts = [argument for argument in arguments if isinstance(argument, str)]
    numbers = [argument for argument in arguments if isinstance(argument, int) and argument >= 0]
    longest = max(map(len, texts), default=0)
    if isinstance(value, str):
        check_length(_parts(name, value, texts, numbers) * CHARACTERS_AN_ITEM)
    if name == "replace" and len(texts) == 2:
        old, new = texts
        count = len(value) + 1 if not old else str(value).count(old)
        check_length(len(str(value)) + min([count, *numbers]) * len(new))
    elif name == "indent":
        text = str(value)
        lines = _parts(name, text, texts, numbers)
        check_length(len(text) + lines * max([4, longest, *numbers]))
    elif name == "expandtabs":
        check_length(len(value) * max([8, *numbers]))
    elif name == "format":
        check_format(str(value), arguments)
    elif name == "join":
        # The method has the separator as its text, the filter as its argument.
        counts = [_count(argument) for argument in arguments if hasattr(argument, "__iter__")]
        check_length(_count(value) * max(counts, default=0))
    elif name == "sum" and any(isinstance(argument, list | tuple) for argument in arguments):
        check_length(_count(value) * size_of([value, *arguments]))
    elif name in ("slice", "batch"):
        check_length(max(numbers, default=0) * CHARACTERS_AN_ITEM)
    elif name == "urlencode":
        check_length(size_of(value) * 3)
    elif name in ("sort", "groupby", "min", "max") and longest > _LONGEST_ATTRIBUTE:
        raise TemplateError(f"chat template has {name} look up a name of {longest} characters")
    elif name in _SQUARE and isinstance(value, str):
        check_length(len(value) * longest // 100)


# What goes through its text once for each character of another.
_SQUARE = {"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim"}
_ITERATING = {
    *("list", "join", "sort", "groupby", "unique", "min", "max", "sum", "slice", "batch"),
    *("map", "select", "reject", "selectattr", "rejectattr"),
}
_LONGEST_ATTRIBUTE = 100
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def _parts(name: str, text: str, texts: list[str], numbers: list[int]) -> int:
    """How many parts a method or filter of this name takes a text into, at most."""
    if name in ("split", "rsplit"):
        count = text.count(texts[0]) + 1 if texts else len(text) // 2 + 1
        return min([count, *(number + 1 for number in numbers)])
    if name in ("splitlines", "indent"):
        return 1 + sum(map(text.count, _LINE_ENDS))
    if name in ("title", "wordcount", "striptags"):
        return len(text) // 2
    return len(text) if name in _ITERATING else 0


def _count(values: Any) -> int:
    return len(values) if hasattr(values, "__len__") else MAX_STEPS


def refuse_method(name: str) -> None:
    # Of the length or the time of these nobody can foretell enough, and none is for chats.
    if name in _REFUSED:
        raise TemplateError(f"chat templates may not use {name}")


_REFUSED = {
    *("encode", "to_bytes", "from_bytes"),
    *("translate", "maketrans", "fromkeys"),
    *("wordwrap", "pprint", "urlize"),
}


def check_format(pattern: str, arguments: Iterable[Any]) -> None:
    """Formats with widths over six digits, and those that repeat long arguments, are refused."""
    arguments = list(arguments)
    check_length(len(pattern) * CHARACTERS_AN_ITEM)
    widths = list(map(int, re.findall(r"\d+", pattern)))
    if "*" in pattern:
        widths += [abs(item) for item in arguments if isinstance(item, int)]
    widest = max(widths, default=0)
    check_numbers([widest])
    longest = max(map(size_of, arguments), default=0)
    check_length((pattern.count("%") + pattern.count("{")) * (longest + widest) + len(pattern))
