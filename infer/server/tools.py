"""Tool calls in the text of a model, as the chat templates of the Llama family ask for them.

Known forms: a JSON object or list of objects with `name` and `arguments` (or `parameters`, as
Llama 3 says), bare, after <|python_tag|>, after [TOOL_CALLS], or between <tool_call> and
</tool_call>; several objects may be separated by semicolons or nothing. What begins like a call is
held back until it is known to be one.
"""

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from infer.server.conversation import Tool

# These may stand anywhere in an answer.
_OPENERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_CLOSER = "</tool_call>"
# These only at its beginning: elsewhere they are ordinary text.
_BARE = ("{", "[")
# What may stand around the objects.
_BETWEEN = re.compile(rf"(?:[\s;,]|{'|'.join(map(re.escape, (*_OPENERS, _CLOSER)))})*")
# A call of `forced_schema` up to its arguments.
_BEGUN_CALL = re.compile(r'\{\s*"name"\s*:\s*("[^"]*")\s*,\s*"arguments"\s*:\s*')
# Of a function that was declared without any, as OpenAI has it.
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
# Keys of a JSON Schema under which data stand, and those under which schemas have names.
_DATA = ("const", "default", "enum", "examples")
_NAMED = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


# Without NaN and Infinity, which Python reads and JSON has not.
_DECODER = json.JSONDecoder(parse_constant=_refuse)


class ToolParser:
    """Reads one choice's text as it comes. tools: those that may be called; parallel: whether more
    than one at once, else the first call is kept; must_call: whether the text was held to
    `forced_schema`."""

    def __init__(self, tools: Sequence[Tool], *, parallel: bool = True, must_call: bool = False):
        self._names = {tool.function.name for tool in tools}
        self._parallel, self._must_call = parallel, must_call
        self._held = ""
        self._has_shown = False
        self._in_call = False

    def push(self, text: str) -> str:
        """Takes text and gives what is certainly no call."""
        self._held += text
        if self._in_call:
            return ""
        stripped = self._held.lstrip()
        if not self._has_shown and (not stripped or stripped.startswith(_BARE)):
            self._in_call = bool(stripped)
            return ""
        places = [self._held.find(opener) for opener in _OPENERS if opener in self._held]
        if places:
            self._in_call = True
            return self._show(min(places))
        return self._show(len(self._held) - _num_begun(self._held))

    def finish(self, reason: str) -> tuple[str, list[dict[str, Any]], str]:
        """The rest of the text, the calls, and why the answer ended: what the engine said, or
        `tool_calls`. A text that is no call after all comes out whole."""
        calls = parse_calls(self._held, self._names) if self._in_call else []
        if calls:
            return "", calls if self._parallel else calls[:1], "tool_calls"
        calls = cut_calls(self._held) if self._must_call else []
        return "" if calls else self._held, calls, reason

    def _show(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        self._has_shown = self._has_shown or bool(shown.strip())
        return shown


def _num_begun(text: str) -> int:
    """Length of the longest end of `text` that an opener begins with."""
    for length in range(min(len(text), max(map(len, _OPENERS)) - 1), 0, -1):
        if any(opener.startswith(text[-length:]) for opener in _OPENERS):
            return length
    return 0


def parse_calls(text: str, names: set[str]) -> list[dict[str, Any]]:
    """OpenAI's tool calls; empty unless the whole text is calls of known tools."""
    found: list[Any] = []
    place = _after_marks(text, 0)
    while place < len(text):
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        found += value if isinstance(value, list) else [value]
        place = _after_marks(text, place)
    calls = [_call(each, names) for each in found]
    return [] if None in calls else [call for call in calls if call is not None]


def _after_marks(text: str, place: int) -> int:
    """Where the next value begins, if there is one."""
    found = _BETWEEN.match(text, place)
    assert found is not None
    return found.end()


def cut_calls(text: str) -> list[dict[str, Any]]:
    """The same of a text that follows `forced_schema` up to where it was cut off, for example by
    `max_tokens`: of the last call there may be only the beginning of its arguments, as OpenAI has
    it. Empty where not even a name is whole."""
    calls = []
    place = _after_marks(text, 0)
    if text.startswith("[", place):
        place = _after_marks(text, place + 1)
    while begun := _BEGUN_CALL.match(text, place):
        place = begun.end()
        try:
            arguments, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            calls.append(_made(json.loads(begun[1]), text[place:]))
            break
        calls.append(_made(json.loads(begun[1]), json.dumps(arguments, ensure_ascii=False)))
        closed = text.find("}", end)
        if closed < 0:
            break
        place = _after_marks(text, closed + 1)
    return calls


def _call(value: Any, names: set[str]) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments = _as_json(value.get("arguments", value.get("parameters", {})))
    if not isinstance(name, str) or name not in names or arguments is None:
        return None
    return _made(name, arguments)


def _made(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _as_json(arguments: Any) -> str | None:
    """Arguments as JSON text, which some models give; None where JSON cannot say them."""
    try:
        if isinstance(arguments, str):
            _DECODER.decode(arguments)
            text = arguments
        else:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()  # half of a pair of surrogates is no text
    except (ValueError, RecursionError):
        return None
    return text


def forced_schema(tools: Sequence[Tool], *, parallel: bool) -> str:
    """The JSON Schema of an answer that must call one of the tools, or with `parallel` several."""
    calls = []
    for number, function in enumerate(tool.function for tool in tools):
        place = f"{'/items' if parallel else ''}/anyOf/{number}/properties/arguments"
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "arguments": _moved(function.parameters, place) or _NO_PARAMETERS,
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    one = {"anyOf": calls}
    return json.dumps({"type": "array", "items": one, "minItems": 1} if parallel else one)


def _moved(schema: Any, place: str) -> Any:
    """A schema for a place inside another: its `#` and `#/…` point to what they did before."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    # Pointers inside what has an address of its own begin there, wherever it stands.
    if not isinstance(schema, dict) or not str(schema.get("$id", "#")).startswith("#"):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and (value == "#" or str(value).startswith("#/")):
            moved[key] = f"#{place}{value[1:]}"
        elif key in _NAMED and isinstance(value, dict):
            moved[key] = {name: _moved(each, place) for name, each in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, place)
    return moved
