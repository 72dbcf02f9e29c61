"""Which characters of a rendered conversation the template wrote, and which came from outside.

The conversation is rendered a second time with every foreign character replaced by a private
one. Where the two renderings agree, the template wrote; where the second shows the private
character, the text is foreign. If the template looks at what it is given (splits at </think>,
compares a name), the second rendering would take another path, so literals of the template are
then left readable between private marks, or (a closing mark would keep white space from being
stripped) after one. If no rendering lines up, only conversations without anything like a control
token pass. Nothing is guessed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.formats.template_bounds import TemplateError

_PLAIN_WORD = re.compile(r"[\w.$/-]+")
# Names of message parts that templates branch on, and never the user's own text.
_STRUCTURE = ("role", "type")
_KNOWN_ROLES = {"system", "user", "assistant", "tool", "developer", "ipython", "function", "model"}


@dataclass(frozen=True)
class Conversation:
    """Everything foreign that goes into a template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any]


Render = Callable[[Conversation], str]


def check_roles(messages: Sequence[Mapping[str, Any]], control: Iterable[str]) -> None:
    """Roles are written into headers, so they are words, and none that completes a token; every
    message but one that calls tools says something."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(
                f"messages[{index}] is {message!r:.80}; it must be an object with role and content"
            )
        role = message.get("role")
        if not isinstance(role, str) or not _PLAIN_WORD.fullmatch(role):
            raise TemplateError(
                f"messages[{index}]: role must be a word such as system, user or assistant, "
                f"got {role!r}"
            )
        if role not in _KNOWN_ROLES and any(role in token for token in control):
            raise TemplateError(f"messages[{index}]: role {role!r} is part of a control token")
        content = message.get("content")
        if not isinstance(content, str | list | Mapping) and not (
            content is None and message.get("tool_calls")
        ):
            raise TemplateError(
                f"messages[{index}]: content is {content!r:.80}; it must be text, or parts or a "
                f"tool's result where the template takes them"
            )


def template_text(
    text: str,
    conversation: Conversation,
    render: Render,
    *,
    literals: frozenset[str],
    control: Sequence[str],
    cuts_from_end: bool,
) -> str:
    """`text` with every foreign character blanked out, of the same length.

    `text` is `render(conversation)`; `literals` are the texts the template itself holds;
    `cuts_from_end` says that it may keep the end of a text by length, which could lose the mark
    before a literal. Raises TemplateError where it cannot be told which control tokens the
    template wrote.
    """
    private = _private_characters("".join([text, *literals]))
    blank = next(private)
    readable = sorted({*literals, *control}, key=len, reverse=True)
    marks = {name: (next(private), next(private)) for name in readable}
    opening_only = {} if cuts_from_end else {name: (mark, "") for name, (mark, _) in marks.items()}
    for kept in ({}, marks, opening_only):
        masks = _Masks(blank, kept, private)
        try:
            masked = render(masks.conversation(conversation))
        except TemplateError:
            continue  # the template refuses what it cannot read
        skeleton = masks.remove(masked)
        if skeleton is not None and _agree(text, skeleton, masks.all_blanks):
            return skeleton
    for foreign in _texts([conversation.messages, conversation.tools, conversation.variables]):
        if name := _resembles(foreign, control):
            raise TemplateError(
                f"chat template changes its input so that the control token {name!r} in it cannot "
                f"be told from the template's own; remove it from the input"
            )
    return text


def _private_characters(avoid: str) -> Iterator[str]:
    present = set(avoid)
    return (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in present)


def _agree(text: str, skeleton: str, blanks: set[str]) -> bool:
    return len(text) == len(skeleton) and all(
        there in blanks or here == there for here, there in zip(text, skeleton, strict=True)
    )


class _Masks:
    """Foreign text with its characters blanked, except the texts in `kept` (between marks)."""

    def __init__(self, blank: str, kept: Mapping[str, tuple[str, str]], private: Iterator[str]):
        self._blank = blank
        self._kept = dict(kept)
        self._private = private
        self._pattern = re.compile("|".join(map(re.escape, self._kept))) if self._kept else None
        self.all_blanks = {blank}

    def conversation(self, conversation: Conversation) -> Conversation:
        return Conversation(
            [self._value(message) for message in conversation.messages],
            None if conversation.tools is None else [self._value(t) for t in conversation.tools],
            {name: self._value(value) for name, value in conversation.variables.items()},
        )

    def remove(self, rendering: str) -> str | None:
        """Marked texts blanked, lone marks gone; None where a part of a text lost its mark."""
        opened = {opening: (name, closing) for name, (opening, closing) in self._kept.items()}
        closed = {closing: name for name, (_, closing) in self._kept.items() if closing}
        parts: list[str] = []
        position = 0
        while position < len(rendering):
            character = rendering[position]
            position += 1
            if character in opened:
                name, closing = opened[character]
                if rendering.startswith(name + closing, position):
                    parts.append(self._blank * len(name))
                    position += len(name + closing)
                elif rendering.startswith(name[:2], position):
                    return None
            elif character in closed:
                if "".join(parts[-2:]) == closed[character][-2:]:
                    return None
            else:
                parts.append(character)
        return "".join(parts)

    def _value(self, value: Any, name: str = "") -> Any:
        if isinstance(value, str):
            if name in _STRUCTURE and _PLAIN_WORD.fullmatch(value):
                return value
            return self._text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self._value(item, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        return value

    def _text(self, text: str) -> str:
        if self._pattern is None:
            return self._blanked(text, self._blank)
        parts, position = [], 0
        for match in self._pattern.finditer(text):
            opening, closing = self._kept[match[0]]
            parts += [self._blanked(text[position : match.start()], self._blank)]
            parts += [opening, match[0], closing]
            position = match.end()
        return "".join(parts) + self._blanked(text[position:], self._blank)

    def _key(self, key: Any) -> Any:
        """Keys are looked up, so words stay; others get a blank of their own to stay apart."""
        if not isinstance(key, str) or _PLAIN_WORD.fullmatch(key):
            return key
        blank = next(self._private)
        self.all_blanks.add(blank)
        return self._blanked(key, blank)

    @staticmethod
    def _blanked(text: str, blank: str) -> str:
        """White space stays (templates strip it), and what JSON escapes (templates dump it)."""
        return "".join(c if c.isspace() or c < " " or c in '"\\' else blank for c in text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _resembles(text: str, control: Iterable[str]) -> str | None:
    """A control token that `text` holds, or that two such texts side by side could form."""
    stripped = text.strip()
    for name in control:
        if name in text:
            return name
        for cut in range(2, len(name)):
            if stripped.endswith(name[:cut]) or stripped.startswith(name[-cut:]):
                return name
    return None
