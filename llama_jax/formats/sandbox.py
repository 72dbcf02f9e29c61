"""A Jinja environment for templates from strangers: no way out, and no way to run for ever.

Jinja's immutable sandbox keeps templates away from Python's internals. It does not bound the work
of a template, so here every loop turn, call, range and long value is charged to a budget, values
are held to a length before they are made where that can be foretold, and a clock stops the rest.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
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

_CHARACTERS_A_STEP = 1000
_STEPS_A_CALL = 5

_steps_left: ContextVar[int] = ContextVar("steps left to the template")
_deadline: ContextVar[float] = ContextVar("when the template is stopped")
_generation_marks: ContextVar[tuple[str, str] | None] = ContextVar("marks", default=None)


class TemplateError(ValueError):
    """A chat template, or the messages given to it, cannot be rendered. The message says why."""


@contextmanager
def budget(generation_marks: tuple[str, str] | None = None) -> Iterator[None]:
    """Everything a template may spend on one rendering.

    With `generation_marks`, {% generation %} blocks come out between the two texts.
    """
    steps = _steps_left.set(MAX_STEPS)
    deadline = _deadline.set(time.monotonic() + MAX_SECONDS)
    marks = _generation_marks.set(generation_marks)
    try:
        yield
    finally:
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
    """`value`, charged by its length, unless it is longer than a template may make it."""
    if isinstance(value, str | list | tuple | dict):
        _check_length(len(value))
        _charge(len(value) // _CHARACTERS_A_STEP)
    return value


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise TemplateError(f"chat template makes a value longer than {MAX_CHARACTERS}")


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
    return str(bounded("".join(map(str, values))))


def _range(*arguments: int) -> range:
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
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


_NESTED_FIELD = re.compile(r"\{[^{}]*\{")  # a width that is itself a field
_JINJA_OWN = (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace() without attributes that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Dict:
    """dict() for templates: an object without the attributes of the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


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

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = _guarded(name, function)
        self.filters["_loop"] = _loop
        self.filters["_concat"] = _concat
        del self.globals["lipsum"]  # filler text of any length
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_now,
            range=_range,
            namespace=_Namespace,
            dict=_Dict(),
        )

    def compile_bounded(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered("_loop", loop.iter)
        _wrap_concatenations(tree)
        return self.from_string(tree)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja's own answer is an undefined value, which prints as nothing.
        raise TemplateError(
            f"chat template reaches for {attribute!r} of a {type(obj).__name__}, which is not safe"
        )

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _charge(_STEPS_A_CALL)
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            _check_growth(function.__name__, text, [*args, *kwargs.values()])
        # The base class would hand its own parameter names to a template's keyword arguments.
        return bounded(SandboxedEnvironment.call(self, context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _charge()
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
            _check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked


def _filtered(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)  # type: ignore[arg-type]


def _wrap_concatenations(node: nodes.Node) -> None:
    """Replace every `a ~ b` below `node` by a filter over [a, b], whose length is bounded."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _wrap_concatenations(value)
            setattr(node, name, _bounded_concatenation(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _wrap_concatenations(item)
                    value[index] = _bounded_concatenation(item)


def _bounded_concatenation(node: nodes.Node) -> nodes.Node:
    if not isinstance(node, nodes.Concat):
        return node
    return _filtered("_concat", nodes.List(node.nodes, lineno=node.lineno))


def _check_product(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        _check_numbers([left])
        if isinstance(right, int | float) and abs(right) > 64:
            raise TemplateError("chat template raises to a power over 64")
        return
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str | list | tuple):
            _check_length(len(value) * count)
            return


def _check_growth(name: str, value: Any, arguments: list[Any]) -> None:
    """Foretell the length of what a text method or filter of this name makes."""
    if name != "default":
        _check_numbers(arguments)
    texts = [argument for argument in arguments if isinstance(argument, str)]
    numbers = [argument for argument in arguments if isinstance(argument, int)]
    if name == "replace" and len(texts) == 2:
        old, new = texts
        count = len(value) + 1 if not old else str(value).count(old)
        _check_length(len(str(value)) + min([count, *numbers]) * len(new))
    elif name in ("indent", "expandtabs"):
        _check_length(len(str(value)) * max([1, *numbers, *map(len, texts)]))
    elif name == "format":
        _check_format(str(value), arguments)
    elif name == "join":
        # The method has the separator as its text, the filter as its argument.
        items, separator = (
            (arguments[0], value)
            if isinstance(value, str) and arguments
            else (value, texts[0] if texts else "")
        )
        if hasattr(items, "__len__"):
            _check_length(len(items) * len(separator) + sum(len(str(item)) for item in items))
    elif name in ("translate", "wordwrap"):
        # What translate makes nobody can foretell, and wordwrap takes the square of a text's time.
        raise TemplateError(f"chat templates may not use {name}")


def _check_format(pattern: str, arguments: Iterable[Any]) -> None:
    """Formats with widths over six digits, and those that repeat long arguments, are refused."""
    arguments = list(arguments)
    if "*" in pattern or _NESTED_FIELD.search(pattern):
        _check_numbers(arguments)
    longest = max((len(item) for item in arguments if hasattr(item, "__len__")), default=0)
    _check_length((pattern.count("%") + pattern.count("{")) * longest + len(pattern))
    digits = 0
    for character in pattern:
        digits = digits + 1 if character.isdigit() else 0
        if digits > len(str(MAX_NUMBER)) - 1:
            raise TemplateError("chat template formats to a width over six digits")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses huge numbers, and whose result is held to a length."""

    # wraps: Jinja reads from attributes whether a filter wants its context or environment.
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _charge()
        # Some filters get Jinja's context or environment first.
        values = [value for value in args if not isinstance(value, _JINJA_OWN)]
        if values:
            _check_growth(name, values[0], [*values[1:], *kwargs.values()])
        return bounded(function(*args, **kwargs))

    return guarded
