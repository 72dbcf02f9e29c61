"""Rows from JSON lines files, each checked and named by file and line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

PACKAGE_PREFIX = "package:"

Kind = Literal["chat", "instruction", "text"]
ROLES = ("system", "user", "assistant")

# The key that tells the kind of a row, and the keys it may have beside it.
_KINDS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "messages": ("chat", ()),
    "instruction": ("instruction", ("input", "output")),
    "text": ("text", ()),
}


@dataclass(frozen=True)
class Row:
    """One line of a file: its kind, its values, and where it came from."""

    kind: Kind
    values: dict[str, Any]
    where: str


def resolve(name: str) -> Path:
    """The path of a data file; `package:demo/train.jsonl` is one that the package ships.

    Raises FileNotFoundError for a file that is not there.
    """
    path = package_path(name) if name.startswith(PACKAGE_PREFIX) else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"the data file {name} does not exist")
    return path


def package_path(name: str) -> Path:
    """`package:demo/train.jsonl` -> where the package has it."""
    return Path(str(resources.files("llama_jax"))) / name.removeprefix(PACKAGE_PREFIX)


def read_rows(names: Sequence[str]) -> Iterator[Row]:
    """The rows of the files in order. Blank lines are skipped, anything else must be a row.

    Raises ValueError naming file and line.
    """
    for name in names:
        found = False
        # Split at line feeds alone: JSON strings may hold other line separators as they are.
        with resolve(name).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found = True
                    yield parse_row(line, f"{name}, line {number}")
        if not found:
            raise ValueError(f"the data file {name} holds no rows")


def parse_row(line: str | bytes, where: str) -> Row:
    """A checked row; ValueError says what is wrong and shows an example of what is right."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a row is a JSON object, not {type(values).__name__}")
    kinds = [key for key in _KINDS if key in values]
    if len(kinds) != 1:
        found = (
            f"both {' and '.join(kinds)}" if kinds else f"the keys {', '.join(values) or '(none)'}"
        )
        raise ValueError(
            f"{where}: the row has {found}; it must have exactly one of messages (chat), "
            f"instruction (with output), text"
        )
    kind, others = _KINDS[kinds[0]]
    unknown = [key for key in values if key != kinds[0] and key not in others]
    if unknown:
        raise ValueError(
            f"{where}: a {kind} row has no key {unknown[0]!r}; it may have "
            f"{', '.join([kinds[0], *others])}"
        )
    if kind == "chat":
        _check_messages(values["messages"], where)
    else:
        _check_texts(kind, values, where)
    return Row(kind, values, where)


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list with at least one message")
    for number, message in enumerate(messages):
        place = f"{where}: messages[{number}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(
                f'{place} must be {{"role": …, "content": …}} and nothing else, not '
                f"{json.dumps(message, ensure_ascii=False)[:80]}"
            )
        if message["role"] not in ROLES:
            raise ValueError(f"{place}.role is {message['role']!r}; allowed are {', '.join(ROLES)}")
        _check_string(message["content"], f"{place}.content")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where}: messages hold no assistant turn, so there is nothing to learn")


def _check_texts(kind: Kind, values: dict[str, Any], where: str) -> None:
    if kind == "instruction" and "output" not in values:
        raise ValueError(f"{where}: an instruction row needs the key output")
    for key, value in values.items():
        _check_string(value, f"{where}: {key}")
    needed = "output" if kind == "instruction" else "text"
    if not values[needed]:
        raise ValueError(f"{where}: {needed} is empty, so there is nothing to learn")


def _check_string(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {json.dumps(value)[:80]}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a surrogate pair, which is no character") from error
