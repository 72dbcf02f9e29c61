"""Bodies and messages to requests, and what is wrong with those that are none."""

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from infer.params import SamplingParams
from infer.server.errors import ApiError

# Members of an object, and entries of a list that are no numbers: reading many is slow, and no
# other request is served meanwhile.
MOST_ENTRIES = 2**14
# Lists and objects of a body: making many is slower still, as Python looks at each for cycles.
MOST_CONTAINERS = 2**17
# In JSON, and up to the end where it does not end.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
Body = TypeVar("Body", bound=BaseModel)
_TEXTS = f"a text, a list of texts, a list of at most {2**20} token ids or a list of such lists"
# Fields of several types, of which pydantic complains one by one: what may stand there.
_UNIONS = {
    "prompt": _TEXTS,
    "input": _TEXTS,
    "stop": "a text or a list of texts",
    "content": 'a text or a list of parts, all {"type": "text", "text": …}, or of an assistant '
    '{"type": "refusal", "refusal": …}',
    "tool_choice": '"none", "auto", "required", {"type": "function", "function": {"name": …}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": […]}}',
}
# What pydantic calls by Python's names.
_IN_JSON = {
    "dict_type": "Input should be an object",
    "list_type": "Input should be a list",
    "model_type": "Input should be an object",
}


def refused(error: ValueError, *, prompt: str = "prompt") -> ApiError:
    """A 400 with the words of whoever refused; such messages begin with the field. prompt: what
    the field is called that others call the prompt."""
    first, _, rest = str(error).partition(" ")
    if first == "prompt":
        return ApiError(400, f"{prompt} {rest}", param=prompt)
    param = first.removesuffix(":")
    is_field = param in SamplingParams.__dataclass_fields__
    return ApiError(400, str(error), param=param if is_field else None)


def parse(kind: type[Body], raw: bytes) -> Body:
    """The request in a body. Raises ApiError 400 naming the field at fault."""
    _check_containers(raw)
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    return validated(kind, value)


def validated(kind: type[Body], value: Any) -> Body:
    """The same of what JSON or a message says."""
    _check_sizes(value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise invalid(error) from None


def _check_containers(raw: bytes) -> None:
    """Raises ApiError for more of them than any request needs, before one is made."""
    if _num_containers(raw) > MOST_CONTAINERS:
        # A text may have any number of brackets.
        count = _num_containers(_STRING.sub(b"", raw))
        if count > MOST_CONTAINERS:
            raise ApiError(
                400,
                f"the body has {count} lists and objects; at most {MOST_CONTAINERS} are taken",
            )


def _num_containers(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")


def _check_sizes(value: Any) -> None:
    """Raises ApiError for an object or a list of more entries than any request needs."""
    rest: list[tuple[str | None, Any]] = [(None, value)]
    while rest:
        param, found = rest.pop()
        is_object = isinstance(found, dict)
        if not is_object and (not isinstance(found, list) or not found or _is_number(found[0])):
            continue
        if len(found) > MOST_ENTRIES:
            raise ApiError(
                400,
                f"{param or 'the body'} has {len(found)} entries in one "
                f"{'object' if is_object else 'list'}; at most {MOST_ENTRIES} are taken",
                param=param,
            )
        if is_object:
            rest += [(key if param is None else param, each) for key, each in found.items()]
        else:
            rest += [(param, each) for each in found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def invalid(error: ValidationError) -> ApiError:
    """The first problem of a body, with what was given where that is a number or should be a word;
    texts, which may be long and private, are not repeated."""
    first = error.errors(include_url=False, include_context=False)[0]
    loc, message = first["loc"], _IN_JSON.get(first["type"], first["msg"])
    for place, part in enumerate(loc[:-1]):
        if part in _UNIONS:
            loc, message = loc[: place + 1], f"Input should be {_UNIONS[str(part)]}"
            break
    param = ".".join(map(str, loc)) or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"unrecognized request argument supplied: {param}",
            param=param,
            code="unknown_parameter",
        )
    if first["type"] == "none_required":
        return ApiError(400, f"{param} is not offered", param=param, code="unsupported_parameter")
    if param is None:
        return ApiError(400, f"the body must be a JSON object: {message}")
    return ApiError(400, f"{param}: {message}{_given(first)}", param=param)


def _given(problem: Any) -> str:
    """What stood where a number, a truth value or one of some names should."""
    kind, given = problem["type"], problem["input"]
    named = kind.startswith(("int_", "float_", "bool_", "literal_"))
    if isinstance(given, bool | int | float) or (named and isinstance(given, str)):
        text = json.dumps(given)
        return f", not {text if len(text) <= 40 else text[:40] + '…'}"
    return ""
