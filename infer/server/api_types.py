"""What clients send, in OpenAI's names. Unknown fields are refused, types are strict.

`IGNORED` lists fields of OpenAI's that are accepted and change nothing; fields typed None would
change the answer and are not offered. Sampling fields beyond OpenAI's (top_k, min_p, …) have the
names of `SamplingParams`.
"""

import json
from typing import Any, Literal, cast

from pydantic import Field

from infer.engine.request import Structure
from infer.params import SamplingParams
from infer.server.conversation import AllowedToolChoice, Message, NamedTool, Tool
from infer.server.errors import ApiError
from infer.server.strict import Ids, Many, StrictBody
from infer.server.validation import refused

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


def _each(name: str, given: str | Ids | Many[str] | Many[Ids]) -> list[str | list[int]]:
    """One text or list of ids, or a list of them, as a list."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, f"{name} is empty", param=name)
    # Entries are all of one kind.
    return cast(list[str | list[int]], [given] if isinstance(given[0], int) else given)


class StreamOptions(StrictBody):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(StrictBody):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictBody):
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


class _Sampled(StrictBody):
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


class EmbeddingRequest(StrictBody):
    model: str = Field(max_length=256)
    input: str | Ids | Many[str] | Many[Ids]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        """Each input, as `prompts`."""
        return _each("input", self.input)


class TokenizeRequest(StrictBody):
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


class DetokenizeRequest(StrictBody):
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
