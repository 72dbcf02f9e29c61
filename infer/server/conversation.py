"""Messages, calls and tools in OpenAI's names, and as chat templates expect them."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from infer.server.strict import Many, StrictBody, wrong


class FunctionCall(StrictBody):
    name: str
    arguments: str
    parsed_arguments: Any = None


class ToolCall(StrictBody):
    id: str
    type: Literal["function"]
    function: FunctionCall
    # Of a call that was put together from the pieces of a stream.
    index: int | None = None


class TextPart(StrictBody):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(StrictBody):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class Message(StrictBody):
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
                raise wrong(f"{field} goes only with role {role!r}, not {self.role!r}")
        parts = self.content if isinstance(self.content, list) else []
        if self.role != "assistant" and any(isinstance(part, RefusalPart) for part in parts):
            raise wrong(
                f"a part of type 'refusal' goes only with role 'assistant', not {self.role!r}; "
                'send {"type": "text", "text": …}'
            )
        if self.role == "tool" and self.tool_call_id is None:
            raise wrong("role 'tool' needs tool_call_id, the id of the call that it answers")
        if self.content in (None, []) and self.refusal is None and not self.tool_calls:
            also = ", refusal or tool_calls" if self.role == "assistant" else ""
            raise wrong(f"role {self.role!r} needs content{also}")
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


class Function(StrictBody):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise wrong(
                f"the parameters of {self.name!r} have the type {str(kind)[:40]!r}; a call has an "
                f"object of them, so it must be 'object'"
            )
        return self


class Tool(StrictBody):
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


class FunctionName(StrictBody):
    name: str


class NamedTool(StrictBody):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(StrictBody):
    mode: Literal["auto", "required"]
    tools: Many[NamedTool] = Field(min_length=1)


class AllowedToolChoice(StrictBody):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools
