"""A Jinja environment for templates from strangers: no way out, and no way to run for ever.

Jinja's immutable sandbox keeps templates away from Python's internals. It does not bound the work
of a template, so here all that works or grows is held to `template_bounds`.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, datetime
from datetime import time as time_of_day
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment, safe_range

from llama_jax.formats.template_bounds import (
    CHARACTERS_AN_ITEM,
    MAX_DEPTH,
    STEPS_A_CALL,
    TemplateError,
    bounded,
    charge,
    check_format,
    check_growth,
    check_length,
    check_numbers,
    check_product,
    refuse_method,
    size_of,
)

_generation_marks: ContextVar[tuple[str, str] | None] = ContextVar("marks", default=None)


class UnsafeTemplateError(TemplateError):
    """The template reaches out of its sandbox, whatever the messages."""


def _loop(iterable: Any) -> Any:
    """What every {% for %} runs over."""
    if hasattr(iterable, "__len__"):
        charge(len(iterable))
        return iterable
    return _counted(iterable)


def _counted(iterable: Iterable[Any]) -> Iterator[Any]:
    for item in iterable:
        charge()
        yield item


def _concat(values: list[Any]) -> str:
    """The ~ operator."""
    check_length(size_of(values))
    return str(bounded("".join(map(str, values))))


def _joined(parts: Iterable[str]) -> str:
    """The text of a macro, a block or indented JSON."""
    kept = []
    length = 0
    for part in parts:
        length += len(part)
        check_length(length)
        kept.append(part)
    return "".join(kept)


def _written(value: Any) -> str:
    """What {{ value }} writes."""
    return str(bounded(str(value)))


def _range(*arguments: int) -> range:
    check_numbers(arguments)
    numbers = safe_range(*arguments)
    charge(len(numbers))
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
    check_length(MAX_DEPTH * margin)
    check_length(size_of(value) // CHARACTERS_AN_ITEM * sum(map(len, separators or ())))
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


@contextmanager
def generation_marks(marks: tuple[str, str] | None) -> Iterator[None]:
    """Inside, {% generation %} blocks come out between the two texts."""
    token = _generation_marks.set(marks)
    try:
        yield
    finally:
        _generation_marks.reset(token)


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
        charge(STEPS_A_CALL)
        values = [*args, *kwargs.values()]
        check_length(size_of(values))
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | int | type):
            refuse_method(function.__name__)
        if isinstance(owner, str):
            check_growth(function.__name__, owner, values)
        # The base class would hand its own parameter names to a template's keyword arguments.
        return bounded(SandboxedEnvironment.call(self, context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        charge()
        if operator == "-" and not isinstance(left, int | float):
            raise TemplateError(f"chat template subtracts from a {type(left).__name__}")
        if operator in ("*", "**"):
            check_product(operator, left, right)
        if operator == "%" and isinstance(left, str):
            check_format(left, right if isinstance(right, tuple) else [right])
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
            check_format(value.__self__, [*args, *kwargs.values()])
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


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses huge numbers, and whose result is held to a length."""

    # wraps: Jinja reads from attributes whether a filter wants its context or environment.
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        charge()
        refuse_method(name)
        # Some filters get Jinja's context or environment first.
        values = [value for value in args if not isinstance(value, _JINJA_OWN)]
        if values:
            check_growth(name, values[0], [*values[1:], *kwargs.values()])
        return bounded(function(*args, **kwargs))

    return guarded
