"""Tool calls in the text of a model, as the chat templates of the Llama family ask for them.

Known forms: a JSON object or list of objects with `name` and `arguments` (or `parameters`, as
Llama 3 says), bare, after <|python_tag|>, after [TOOL_CALLS], or between <tool_call> and
</tool_call>; several objects may be separated by semicolons or nothing. What begins like a call is
held back until it is known to be one.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from infer.server.api_types import Tool

# These may stand anywhere in an answer.
_OPENERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_CLOSER = "</tool_call>"
# These only at its beginning: elsewhere they are ordinary text.
_BARE = ("{", "[")


class ToolParser:
    """Reads one choice's text as it comes. tools: those that may be called."""

    def __init__(self, tools: Sequence[Tool]):
        self._names = {tool.function.name for tool in tools}
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

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls. A text that is no call after all comes out whole."""
        calls = parse_calls(self._held, self._names) if self._in_call else []
        return ("", calls) if calls else (self._held, [])

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
    for mark in (*_OPENERS, _CLOSER):
        text = text.replace(mark, " ")
    decoder = json.JSONDecoder()
    found: list[Any] = []
    rest = text.strip().strip(";").strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip().lstrip(";,").lstrip()
    calls = [_call(each, names) for each in found]
    return [] if None in calls else [call for call in calls if call is not None]


def _call(value: Any, names: set[str]) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if name not in names:
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def forced_schema(tools: Sequence[Tool], *, name: str | None, parallel: bool) -> str:
    """The JSON Schema of an answer that must call a tool: the one of that name, or any."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
        if name in (None, tool.function.name)
    ]
    one = calls[0] if len(calls) == 1 else {"anyOf": calls}
    many = {"type": "array", "items": one, "minItems": 1}
    return json.dumps(many if parallel and name is None else one)
