"""Chat templates: messages to text, as transformers renders them."""

import secrets
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes

from llama_jax.formats.sandbox import (
    TemplateEnvironment,
    UnsafeTemplateError,
    generation_marks,
    strftime_on,
)
from llama_jax.formats.template_bounds import MAX_CHARACTERS, TemplateError, budget

Message = Mapping[str, Any]

MAX_TEMPLATE_CHARACTERS = 1_000_000
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}


class ChatTemplate:
    """A compiled template. `special_tokens` are the names it may use, such as bos_token; `today`
    is the day that its strftime_now tells (None: the present, with the time of day).

    Raises TemplateError when the text does not compile; rendering raises it too, with the
    template's own message where the template refuses the messages.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        today: date | None = None,
    ):
        self.source = source
        self._clock = {} if today is None else {"strftime_now": strftime_on(today)}
        self._special_tokens = dict(special_tokens or {})
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation. `variables` are further names the template reads."""
        return self._render(messages, add_generation_prompt, tools, variables, None)

    def check_safe(self) -> None:
        """Raises UnsafeTemplateError where a first conversation already shows that it reaches out
        of its sandbox. It may refuse that conversation for any other reason."""
        try:
            self.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        except UnsafeTemplateError:
            raise
        except TemplateError:
            pass

    def render_with_generation(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text without generation prompt, and the ranges its {% generation %} blocks wrote."""
        nonce = secrets.token_hex(16)
        opening, closing = f"\ue000{nonce}(", f"\ue000{nonce})"
        marked = self._render(messages, False, tools, variables, (opening, closing))
        text, spans = "", []
        for part in marked.split(opening):
            content, mark, rest = part.partition(closing)
            if mark:
                spans.append((len(text), len(text) + len(content)))
            text += content + rest
        return text, spans

    @property
    def has_generation_blocks(self) -> bool:
        return "generation" in self.source and "endgeneration" in self.source

    @property
    def literals(self) -> frozenset[str]:
        """Every text the template itself can write or compare with."""
        return _literals(self.source)

    @property
    def cuts_from_end(self) -> bool:
        """Whether it may take a slice that counts from the end, such as content[-10:]."""
        return _cuts_from_end(self.source)

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        marks: tuple[str, str] | None,
    ) -> str:
        taken = (_RESERVED | set(self._special_tokens)) & set(variables)
        if taken:
            raise TemplateError(f"chat template variables {sorted(taken)} are set by the product")
        names = {
            **self._special_tokens,
            **plain(variables),
            **self._clock,
            "messages": [plain(_without_none(message)) for message in messages],
            "tools": plain(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        length = 0
        try:
            with budget(names), generation_marks(marks):
                for part in self._template.generate(names):
                    parts.append(part)
                    length += len(part)
                    if length > MAX_CHARACTERS:
                        raise TemplateError(
                            f"chat template writes over {MAX_CHARACTERS} characters"
                        )
        except TemplateError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"chat template: {error.message}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise TemplateError(f"chat template: {type(error).__name__}: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise TemplateError(f"chat template: too much work: {type(error).__name__}") from error
        return "".join(parts)


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateError(f"chat template is longer than {MAX_TEMPLATE_CHARACTERS} characters")
    try:
        return TemplateEnvironment().compile_bounded(source)
    except UnsafeTemplateError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, ValueError, RecursionError, SyntaxError) as error:
        raise TemplateError(f"chat template does not compile: {error}") from error


@lru_cache(maxsize=64)
def _literals(source: str) -> frozenset[str]:
    tree = TemplateEnvironment().parse(source)
    constants = {node.value for node in tree.find_all(nodes.Const)}
    written = {node.data for node in tree.find_all(nodes.TemplateData)}
    return frozenset(text for text in constants | written if isinstance(text, str) and text)


@lru_cache(maxsize=64)
def _cuts_from_end(source: str) -> bool:
    starts = [cut.start for cut in TemplateEnvironment().parse(source).find_all(nodes.Slice)]
    # A negative number is a Neg node, so every constant counts from the start.
    return any(start is not None and not isinstance(start, nodes.Const) for start in starts)


def _without_none(message: Message) -> dict[str, Any]:
    """Templates test for a key's presence; a null from an API means absent."""
    if not isinstance(message, Mapping):
        raise TemplateError(f"a message must be an object with role and content, got {message!r}")
    return {key: value for key, value in message.items() if value is not None}


def plain(value: Any) -> Any:
    """A copy of JSON values. Other objects have methods no template may reach."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item) for item in value]
    raise TemplateError(f"chat templates take JSON values, got a {type(value).__name__}")
