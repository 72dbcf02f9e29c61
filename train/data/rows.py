"""Rows: the four kinds, and what each must hold."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama_jax.formats import json_fields

Kind = Literal["chat", "instruction", "preference", "text"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class _Form:
    kind: Kind
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


# The key that tells the kind of a row, and the keys it has beside it.
_FORMS = {
    "messages": _Form("chat"),
    "instruction": _Form("instruction", ("output",), ("input",)),
    "prompt": _Form("preference", ("chosen", "rejected")),
    "text": _Form("text"),
}
OPTIONAL_KEYS = frozenset(key for form in _FORMS.values() for key in form.optional)
_WANTED = (
    "exactly one of messages (chat), instruction (with output), prompt (with chosen and rejected), "
    "text"
)


@dataclass(frozen=True)
class Row:
    """One row of a source: its kind, its values, and where it came from.

    Of a preference row, `prompt` is a string or a list of messages; `chosen` and `rejected` are
    strings.
    """

    kind: Kind
    values: dict[str, Any]
    where: str


def parse_json(line: str | bytes, where: str) -> Any:
    """Bytes are UTF-8, with or without its mark; Python's own parser would guess at others, whose
    line feeds are no bytes of their own."""
    try:
        text = line if isinstance(line, str) else line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not a JSON object: no UTF-8, save it as such: {error}"
        ) from error
    try:
        return json_fields.parse_json(text, unique=True)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON object: {error}") from error


def check_row(values: Any, where: str) -> Row:
    """A checked row; ValueError says what is wrong and what would be right."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a row is a JSON object, not {type(values).__name__}")
    telling = [key for key in _FORMS if key in values]
    if len(telling) != 1:
        found = (
            f"both {' and '.join(telling)}"
            if telling
            else f"the keys {', '.join(map(str, values)) or '(none)'}"
        )
        raise ValueError(f"{where}: the row has {found}; it must have {_WANTED}")
    form = _FORMS[telling[0]]
    allowed = (telling[0], *form.needed, *form.optional)
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise ValueError(
            f"{where}: a {form.kind} row has no key {unknown[0]!r}; it may have "
            f"{', '.join(allowed)}. A source with other names can be read with columns"
        )
    missing = [key for key in form.needed if key not in values]
    if missing:
        raise ValueError(f"{where}: a row with {telling[0]} needs the key {missing[0]}")
    if form.kind == "chat":
        _check_chat(values["messages"], where)
    elif form.kind == "preference":
        values = _check_preference(values, where)
    else:
        _check_texts(form.kind, values, where)
    return Row(form.kind, values, where)


def _check_chat(messages: Any, where: str) -> None:
    _check_messages(messages, "messages", where)
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where}: messages hold no assistant turn, so there is nothing to learn")
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"]:
            raise ValueError(
                f"{where}: messages[{number}].content is empty, so there is nothing to learn; give "
                f"the assistant's answer, or end the conversation before it"
            )


def _check_messages(messages: Any, key: str, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        hint = ""
        if key == "messages" and isinstance(messages, str):
            hint = "; JSON in a cell is read only under a CSV header messages"
        raise ValueError(
            f"{where}: {key} must be a list with at least one message, "
            f'{{"role": …, "content": …}}, not {_shown(messages)}{hint}'
        )
    for number, message in enumerate(messages):
        place = f"{where}: {key}[{number}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(
                f'{place} must be {{"role": …, "content": …}} and nothing else, not '
                f"{_shown(message)}"
            )
        if message["role"] not in ROLES:
            raise ValueError(f"{place}.role is {message['role']!r}; allowed are {', '.join(ROLES)}")
        _check_string(message["content"], f"{place}.content")


def _check_preference(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row with both answers as strings."""
    prompt = values["prompt"]
    if isinstance(prompt, str):
        _check_string(prompt, f"{where}: prompt")
    elif isinstance(prompt, list):
        _check_messages(prompt, "prompt", where)
        if prompt[-1]["role"] == "assistant":
            raise ValueError(
                f"{where}: prompt ends with an assistant's turn; the answers stand in chosen and "
                f"rejected"
            )
    else:
        raise ValueError(
            f"{where}: prompt must be a string or a list of messages, not {_shown(prompt)}"
        )
    return {"prompt": prompt, **{key: _answer(values, key, where) for key in _ANSWERS}}


_ANSWERS = ("chosen", "rejected")


def _answer(values: Mapping[str, Any], key: str, where: str) -> str:
    """A string, or that of a list of one assistant's message, as some data sets have it."""
    value = values[key]
    if isinstance(value, list):
        _check_messages(value, key, where)
        if len(value) != 1 or value[0]["role"] != "assistant":
            raise ValueError(
                f"{where}: {key} must be a string or one assistant message; earlier turns belong "
                f"to prompt"
            )
        value = value[0]["content"]
    _check_string(value, f"{where}: {key}")
    if not value:
        raise ValueError(f"{where}: {key} is empty, so there is nothing to compare")
    return value


def _check_texts(kind: Kind, values: dict[str, Any], where: str) -> None:
    for key, value in values.items():
        _check_string(value, f"{where}: {key}")
    needed = "output" if kind == "instruction" else "text"
    if not values[needed]:
        raise ValueError(f"{where}: {needed} is empty, so there is nothing to learn")


def _check_string(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {_shown(value)}")
    json_fields.check_characters(value, what)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:80]
