"""What clients send, in OpenAI's names. Unknown fields are refused, types are strict.

`IGNORED` lists fields of OpenAI's that are accepted and change nothing; fields typed None would
change the answer and are not offered. Sampling fields beyond OpenAI's (top_k, min_p, …) have the
names of `SamplingParams`.
"""

import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from infer.engine.request import Structure
from infer.params import SamplingParams
from infer.server.errors import ApiError

# By the path to them, lists left out.
IGNORED = (
    # Notes for OpenAI's own bookkeeping and billing.
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "messages.content.prompt_cache_breakpoint",
    # Text is the only one.
    "modalities",
    # Parts of an answer that say its text once more, or number its calls.
    "messages.annotations",
    "messages.parsed",
    "messages.tool_calls.index",
    "messages.tool_calls.function.parsed_arguments",
    # OpenAI pads chunks against eavesdroppers; there is nothing to switch off here.
    "stream_options.include_obfuscation",
    # A schema holds the answer always, and the model does not read what stands beside it.
    "response_format.json_schema.name",
    "response_format.json_schema.description",
    "response_format.json_schema.strict",
    "tools.function.strict",
)

# Members of an object, and entries of a list that are no numbers: reading many is slow, and no
# other request is served meanwhile.
MOST_ENTRIES = 2**14
# Lists and objects of a body: making many is slower still, as Python looks at each for cycles.
MOST_CONTAINERS = 2**17
# In JSON, and up to the end where it does not end.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)

Item = TypeVar("Item")
# Read up to the first entry that is wrong: millions of them would be told apart for half a minute.
Many = Annotated[list[Item], Field(fail_fast=True)]
Ids = Annotated[Many[int], Field(max_length=2**20)]


def _each(name: str, given: str | Ids | Many[str] | Many[Ids]) -> list[str | list[int]]:
    """One text or list of ids, or a list of them, as a list."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, f"{name} is empty", param=name)
    # Entries are all of one kind.
    return cast(list[str | list[int]], [given] if isinstance(given[0], int) else given)


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


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(_Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """type `regex` and `grammar` (Lark) are ours, beside OpenAI's three."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None

    def structure(self, max_bytes: int) -> Structure | None:
        """What the engine must hold the text to. Raises ApiError."""
        sources = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        for name, value in sources.items():
            if (value is not None) != (self.type == name):
                problem = "is missing" if value is None else f"does not go with type {self.type!r}"
                param = f"response_format.{name}"
                raise ApiError(400, f"{param} {problem}", param=param)
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Structure("json_object")
        source = self.regex if self.type == "regex" else self.grammar
        if self.json_schema is not None:
            # No schema means any JSON object, as with OpenAI.
            schema = self.json_schema.schema_
            source = json.dumps({"type": "object"} if schema is None else schema)
        assert source is not None
        if len(source.encode("utf-8", "surrogatepass")) > max_bytes:
            param = f"response_format.{self.type}"
            raise ApiError(400, f"{param} is over {max_bytes} bytes", param=param)
        return Structure(self.type, source)


class _Sampled(_Body):
    """What both generation endpoints take."""

    model: str = Field(max_length=256)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | Many[str] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, **more: Any) -> SamplingParams:
        """Raises ApiError for a value out of range. A null is a field left out, as with OpenAI."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options goes only with stream true", param="stream_options")
        names = [
            "max_tokens",
            "temperature",
            "top_p",
            "n",
            "stop",
            "seed",
            "frequency_penalty",
            "presence_penalty",
            "top_k",
            "min_p",
            "repetition_penalty",
            "min_tokens",
            "ignore_eos",
        ]
        given = {name: getattr(self, name) for name in names}
        given["logit_bias"] = None if self.logit_bias is None else _bias(self.logit_bias)
        given.update(more)
        # temperature and top_p are 1 where OpenAI's are: the defaults of SamplingParams.
        try:
            return SamplingParams(**{key: val for key, val in given.items() if val is not None})
        except ValueError as error:
            raise refused(error) from error


class CompletionRequest(_Sampled):
    prompt: str | Ids | Many[str] | Many[Ids]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    def sampling(self) -> SamplingParams:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(
                400, f"best_of is {self.best_of}; only the value of n is offered", param="best_of"
            )
        return self._sampling(logprobs=self.logprobs, echo=self.echo)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids. Raises ApiError for an empty list."""
        return _each("prompt", self.prompt)


class FunctionCall(_Body):
    name: str
    arguments: str
    parsed_arguments: Any = None


class ToolCall(_Body):
    id: str
    type: Literal["function"]
    function: FunctionCall
    # Of a call that was put together from the pieces of a stream.
    index: int | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(_Body):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[Part] | None = None
    # What the assistant said in place of an answer.
    refusal: str | None = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    # The openai package sends these back as parts of an answer, the last two as nulls.
    annotations: list[Any] | None = None
    parsed: Any = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        for field, role in (
            ("tool_calls", "assistant"),
            ("tool_call_id", "tool"),
            ("refusal", "assistant"),
        ):
            if getattr(self, field) is not None and self.role != role:
                raise _wrong(f"{field} goes only with role {role!r}, not {self.role!r}")
        parts = self.content if isinstance(self.content, list) else []
        if self.role != "assistant" and any(isinstance(part, RefusalPart) for part in parts):
            raise _wrong(
                f"a part of type 'refusal' goes only with role 'assistant', not {self.role!r}; "
                'send {"type": "text", "text": …}'
            )
        if self.role == "tool" and self.tool_call_id is None:
            raise _wrong("role 'tool' needs tool_call_id, the id of the call that it answers")
        if self.content in (None, []) and self.refusal is None and not self.tool_calls:
            also = ", refusal or tool_calls" if self.role == "assistant" else ""
            raise _wrong(f"role {self.role!r} needs content{also}")
        return self

    @property
    def text(self) -> str:
        """All that it says: what its parts say, joined, and last the refusal."""
        said = self.content or ""
        if isinstance(said, list):
            said = "\n".join(p.text if isinstance(p, TextPart) else p.refusal for p in said)
        return "\n".join(filter(None, (said, self.refusal)))

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: one text, arguments as values."""
        # Templates know no developer; OpenAI's newer name for the same.
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [_to_template(call) for call in self.tool_calls]
        return message


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("message", message)


def _to_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


class Function(_Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise _wrong(
                f"the parameters of {self.name!r} have the type {str(kind)[:40]!r}; a call has an "
                f"object of them, so it must be 'object'"
            )
        return self


class Tool(_Body):
    type: Literal["function"]
    function: Function

    def to_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        if self.function.parameters is not None:
            function["parameters"] = self.function.parameters
        return {"type": "function", "function": function}


class FunctionName(_Body):
    name: str


class NamedTool(_Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Body):
    mode: Literal["auto", "required"]
    tools: Many[NamedTool] = Field(min_length=1)


class AllowedToolChoice(_Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(_Sampled):
    messages: Many[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Many[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None
    reasoning_effort: None = None
    verbosity: None = None
    functions: None = None
    function_call: None = None

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def tools_named(self) -> list[str] | None:
        """Those that `tool_choice` leaves, if it names any."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedToolChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    @property
    def callable_tools(self) -> list[Tool]:
        tools, named = self.tools or [], self.tools_named
        if self.tool_choice == "none":
            return []
        return [tool for tool in tools if named is None or tool.function.name in named]

    @property
    def must_call(self) -> bool:
        if isinstance(self.tool_choice, AllowedToolChoice):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def sampling(self) -> SamplingParams:
        limit = self.max_completion_tokens
        if limit is not None and self.max_tokens is not None and limit != self.max_tokens:
            raise ApiError(
                400,
                f"max_tokens is {self.max_tokens} and max_completion_tokens {limit}; give one",
                param="max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs goes only with logprobs true", param="top_logprobs")
        wanted = (self.top_logprobs or 0) if self.logprobs else None
        more = {} if limit is None else {"max_tokens": limit}
        try:
            return self._sampling(logprobs=wanted, **more)
        except ApiError as error:
            # The engine's one field is called top_logprobs here.
            if error.param == "logprobs":
                error.param = "top_logprobs"
                error.message = "top_" + error.message
            raise


class EmbeddingRequest(_Body):
    model: str = Field(max_length=256)
    input: str | Ids | Many[str] | Many[Ids]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        """Each input, as `prompts`."""
        return _each("input", self.input)


class TokenizeRequest(_Body):
    """prompt: a text, or messages: a conversation as the model would read it, with what a chat says
    of tools and the template. add_special_tokens, of a prompt: left out is true."""

    model: str = Field(max_length=256)
    prompt: str | None = None
    messages: Many[Message] | None = None
    add_special_tokens: bool | None = None
    tools: Many[Tool] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat(self) -> ChatRequest | None:
        """The conversation; None for a prompt. Raises ApiError for what goes with the other."""
        fields = ("messages", "tools", "chat_template", "chat_template_kwargs")
        given = {name: getattr(self, name) for name in fields}
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if self.messages is not None:
            if self.add_special_tokens is False:
                raise ApiError(
                    400,
                    "add_special_tokens is about prompt; a conversation has what its template "
                    "writes",
                    param="add_special_tokens",
                )
            return ChatRequest(model=self.model, **given)
        for name in fields:
            if given[name] is not None:
                raise ApiError(400, f"{name} is about messages; leave it out", param=name)
        return None


class DetokenizeRequest(_Body):
    model: str = Field(max_length=256)
    tokens: Ids
    skip_special_tokens: bool | None = None


def _bias(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for token, value in given.items():
        # 01 would be 1 once more.
        is_id = token.isascii() and token.isdigit() and len(token) < 11
        if not is_id or token != str(int(token)):
            raise ApiError(
                400,
                f"logit_bias has the key {token[:40]!r}; keys are token ids",
                param="logit_bias",
            )
        biases[int(token)] = value
    return biases


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
