"""A Jinja environment for templates from strangers: no way out, and no way to run for ever.

Jinja's immutable sandbox keeps templates away from Python's internals. It does not bound the work
of a template, so here every loop turn, call, range and long value is charged to a budget, values
are held to a size before they are made where that can be foretold, and a clock stops the rest. The
size of a list counts what it shares each time, as text, comparison and hash go through it.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, datetime
from datetime import time as time_of_day
from itertools import chain
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment, safe_range

MAX_STEPS = 200_000
MAX_SECONDS = 20.0
MAX_CHARACTERS = 10_000_000
# A larger number than any template needs as width, count or repetition.
MAX_NUMBER = 1_000_000
MAX_BITS = 4096
MAX_DEPTH = 100

_CHARACTERS_A_STEP = 1000
# About the memory of an item of a list, and of a list or dict itself.
_CHARACTERS_AN_ITEM = 50
_CHARACTERS_A_LIST = 200
_STEPS_A_CALL = 5

_steps_left: ContextVar[int] = ContextVar("steps left to the template")
_deadline: ContextVar[float] = ContextVar("when the template is stopped")
_generation_marks: ContextVar[tuple[str, str] | None] = ContextVar("marks", default=None)
# By id: what a template is given outlives the rendering and does not change.
_given_sizes: ContextVar[dict[int, int]] = ContextVar("sizes of what the template is given")


class TemplateError(ValueError):
    """A chat template, or the messages given to it, cannot be rendered. The message says why."""


class UnsafeTemplateError(TemplateError):
    """The template reaches out of its sandbox, whatever the messages."""


@contextmanager
def budget(given: Any, generation_marks: tuple[str, str] | None = None) -> Iterator[None]:
    """Everything a template may spend on one rendering of the values `given`.

    With `generation_marks`, {% generation %} blocks come out between the two texts.
    """
    steps = _steps_left.set(MAX_STEPS)
    deadline = _deadline.set(time.monotonic() + MAX_SECONDS)
    marks = _generation_marks.set(generation_marks)
    sizes = _given_sizes.set({})
    try:
        _remember(given, _given_sizes.get())
        yield
    finally:
        _given_sizes.reset(sizes)
        _generation_marks.reset(marks)
        _deadline.reset(deadline)
        _steps_left.reset(steps)


def _charge(steps: int = 1) -> None:
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
        _check_length(length)
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TemplateError(f"chat template makes a number of over {MAX_BITS} bits")
    elif not length and isinstance(value, Iterator):
        return map(bounded, value)
    else:
        _check_length(_size(value))
    _charge(length // _CHARACTERS_A_STEP)
    return value


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise TemplateError(f"chat template makes a value longer than {MAX_CHARACTERS}")


_NONE: dict[str, str] = {}
_SIZED = (str, list, tuple, dict)
_LISTS = (list, tuple, dict, type(_NONE.keys()), type(_NONE.values()), type(_NONE.items()))


def _size(value: Any, depth: int = 0) -> int:
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
        size += _CHARACTERS_AN_ITEM
        if isinstance(part, str):
            size += len(part)
        else:
            size += given.get(id(part)) or _size(part, depth + 1)
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
        sizes[id(value)] = _size(value)


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise TemplateError(f"chat template passes the number {value:.6g}, over {MAX_NUMBER}")


def _loop(iterable: Any) -> Any:
    """What every {% for %} runs over."""
    if hasattr(iterable, "__len__"):
        _charge(len(iterable))
        return iterable
    return _counted(iterable)


def _counted(iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        _charge()
        yield item


def _concat(values: list[Any]) -> str:
    """The ~ operator."""
    _check_length(_size(values))
    return str(bounded("".join(map(str, values))))


def _joined(parts: Iterable[str]) -> str:
    """The text of a macro, a block or indented JSON."""
    kept = []
    length = 0
    for part in parts:
        length += len(part)
        _check_length(length)
        kept.append(part)
    return "".join(kept)


def _written(value: Any) -> str:
    """What {{ value }} writes."""
    return str(bounded(str(value)))


def _range(*arguments: int) -> range:
    _check_numbers(arguments)
    numbers = safe_range(*arguments)
    _charge(len(numbers))
    return numbers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: plain JSON, without Jinja's escapes for HTML."""
    margin = indent if isinstance(indent, int) else len(indent or "")
    _check_length(MAX_DEPTH * margin)
    _check_length(_size(value) // _CHARACTERS_AN_ITEM * sum(map(len, separators or ())))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return encoder.encode(value) if indent is None else _joined(encoder.iterencode(value))


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def strftime_on(day: date) -> Callable[[str], str]:
    """A template's strftime_now whose present is the midnight that `day` begins with."""
    moment = datetime.combine(day, time_of_day())

    def strftime_now(pattern: str) -> str:
        return moment.strftime(pattern)

    return strftime_now


_NESTED_FIELD = re.compile(r"\{[^{}]*\{")  # a width that is itself a field
_FIELD_OF_FIELD = re.compile(r"\{[^{}:!]*[.\[]")
_PRIVATE_FIELD = re.compile(r"\{[^{}:!]*[.\[]_")
_JINJA_OWN = (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace() without attributes that start with an underscore.

    As text it does not tell its attributes, for these may change to other namespaces without end.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = _dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Dict:
    """dict() for templates: an object without the attributes of the type itself."""

    def __call__(self, pairs: Any = (), /, **kwargs: Any) -> dict[Any, Any]:
        # One by one under the clock: keys of equal hash take the square of their number.
        return dict(pairs if isinstance(pairs, dict) else map(bounded, pairs), **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(map(bounded, keys), value)


_dict = _Dict()


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise TemplateError(f"chat template sets the private name {name!r} in a namespace")


class _Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %}: what the model itself is to write."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        marks = _generation_marks.get()
        return f"{marks[0]}{caller()}{marks[1]}" if marks else str(caller())


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The names, filters and settings transformers gives to chat templates, within a budget."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})
    concat = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_written,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = _guarded(name, function)
        self.filters["_loop"] = _loop
        self.filters["_concat"] = _concat
        self.filters["_bounded"] = bounded
        del self.globals["lipsum"]  # filler text of any length
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_now,
            range=_range,
            namespace=_Namespace,
            dict=_dict,
        )

    def compile_bounded(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        _refuse_internals(tree)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered("_loop", loop.iter)
        _wrap_expressions(tree)
        return self.from_string(tree)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja's own answer is an undefined value, which prints as nothing.
        raise UnsafeTemplateError(
            f"chat template reaches for {attribute!r} of a {type(obj).__name__}, which is not safe"
        )

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _charge(_STEPS_A_CALL)
        values = [*args, *kwargs.values()]
        _check_length(_size(values))
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | int | type):
            _refuse_method(function.__name__)
        if isinstance(owner, str):
            _check_growth(function.__name__, owner, values)
        # The base class would hand its own parameter names to a template's keyword arguments.
        return bounded(SandboxedEnvironment.call(self, context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _charge()
        if operator == "-" and not isinstance(left, int | float):
            raise TemplateError(f"chat template subtracts from a {type(left).__name__}")
        if operator in ("*", "**"):
            _check_product(operator, left, right)
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else [right])
        return bounded(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> Any:
            fields = value.__self__.replace("{{", "")
            if private := _PRIVATE_FIELD.search(fields):
                raise UnsafeTemplateError(
                    f"chat template formats {private[0][:40]!r}…, a private name, which is not safe"
                )
            if _NESTED_FIELD.search(fields) or _FIELD_OF_FIELD.search(fields):
                raise TemplateError("chat template formats with a field in a field")
            _check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked


_INTERNAL = re.compile(r"__\w+__")


def _refuse_internals(tree: nodes.Template) -> None:
    """Names of Python's internals, wherever they stand: a branch may be for few conversations."""
    named = [(node.attr, node.lineno) for node in tree.find_all(nodes.Getattr)]
    items = [(node.arg, node.lineno) for node in tree.find_all(nodes.Getitem)]
    named += [(name.value, line) for name, line in items if isinstance(name, nodes.Const)]
    for name, line in named:
        if isinstance(name, str) and _INTERNAL.fullmatch(name):
            raise UnsafeTemplateError(
                f"chat template reaches for {name!r} in line {line}, which is not safe"
            )


def _filtered(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)  # type: ignore[arg-type]


def _wrap_expressions(node: nodes.Node) -> None:
    """Put what copies or compares values below `node` into filters that hold it to bounds."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _wrap_expressions(value)
            setattr(node, name, _wrapped(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _wrap_expressions(item)
                    value[index] = _wrapped(item)


def _wrapped(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        return _filtered("_concat", nodes.List(node.nodes, lineno=node.lineno))
    is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
    is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    if is_slice or (isinstance(node, _MADE) and not is_target):
        return _filtered("_bounded", node)
    return node


_MADE = (nodes.List, nodes.Tuple, nodes.Dict, nodes.Compare, nodes.Test)


def _check_product(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        _check_numbers([left])
        if isinstance(right, int | float) and abs(right) > 64:
            raise TemplateError("chat template raises to a power over 64")
        return
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str | list | tuple):
            _check_length(max(_size(value), 1) * count)
            return


def _check_growth(name: str, value: Any, arguments: list[Any]) -> None:
    """Foretell the length of what a text method or filter of this name makes."""
    if name != "default":
        _check_numbers(arguments)
    texts = [argument for argument in arguments if isinstance(argument, str)]
    numbers = [argument for argument in arguments if isinstance(argument, int) and argument >= 0]
    longest = max(map(len, texts), default=0)
    if isinstance(value, str):
        _check_length(_parts(name, value, texts, numbers) * _CHARACTERS_AN_ITEM)
    if name == "replace" and len(texts) == 2:
        old, new = texts
        count = len(value) + 1 if not old else str(value).count(old)
        _check_length(len(str(value)) + min([count, *numbers]) * len(new))
    elif name == "indent":
        text = str(value)
        lines = _parts(name, text, texts, numbers)
        _check_length(len(text) + lines * max([4, longest, *numbers]))
    elif name == "expandtabs":
        _check_length(len(value) * max([8, *numbers]))
    elif name == "format":
        _check_format(str(value), arguments)
    elif name == "join":
        # The method has the separator as its text, the filter as its argument.
        counts = [_count(argument) for argument in arguments if hasattr(argument, "__iter__")]
        _check_length(_count(value) * max(counts, default=0))
    elif name == "sum" and any(isinstance(argument, list | tuple) for argument in arguments):
        _check_length(_count(value) * _size([value, *arguments]))
    elif name in ("slice", "batch"):
        _check_length(max(numbers, default=0) * _CHARACTERS_AN_ITEM)
    elif name == "urlencode":
        _check_length(_size(value) * 3)
    elif name in ("sort", "groupby", "min", "max") and longest > _LONGEST_ATTRIBUTE:
        raise TemplateError(f"chat template has {name} look up a name of {longest} characters")
    elif name in _SQUARE and isinstance(value, str):
        _check_length(len(value) * longest // 100)


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


def _refuse_method(name: str) -> None:
    # Of the length or the time of these nobody can foretell enough, and none is for chats.
    if name in _REFUSED:
        raise TemplateError(f"chat templates may not use {name}")


_REFUSED = {
    *("encode", "to_bytes", "from_bytes"),
    *("translate", "maketrans", "fromkeys"),
    *("wordwrap", "pprint", "urlize"),
}


def _check_format(pattern: str, arguments: Iterable[Any]) -> None:
    """Formats with widths over six digits, and those that repeat long arguments, are refused."""
    arguments = list(arguments)
    _check_length(len(pattern) * _CHARACTERS_AN_ITEM)
    widths = list(map(int, re.findall(r"\d+", pattern)))
    if "*" in pattern:
        widths += [abs(item) for item in arguments if isinstance(item, int)]
    widest = max(widths, default=0)
    _check_numbers([widest])
    longest = max(map(_size, arguments), default=0)
    _check_length((pattern.count("%") + pattern.count("{")) * (longest + widest) + len(pattern))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses huge numbers, and whose result is held to a length."""

    # wraps: Jinja reads from attributes whether a filter wants its context or environment.
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _charge()
        _refuse_method(name)
        # Some filters get Jinja's context or environment first.
        values = [value for value in args if not isinstance(value, _JINJA_OWN)]
        if values:
            _check_growth(name, values[0], [*values[1:], *kwargs.values()])
        return bounded(function(*args, **kwargs))

    return guarded
