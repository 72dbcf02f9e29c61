"""/v1/chat/completions: a conversation in, the assistant's turn out, tool calls included."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from infer.completion import Alternative, Piece, TokenLogprob
from infer.engine.request import Request, Started, Structure
from infer.server.answers import Answer, Choice
from infer.server.api_types import ChatRequest
from infer.server.completions import check_length, check_text, within_ceilings
from infer.server.conversation import AllowedToolChoice, NamedTool
from infer.server.errors import ApiError
from infer.server.generation import Arrival, Context, Generation
from infer.server.loaded import Lease
from infer.server.tools import ToolParser, forced_schema

if TYPE_CHECKING:
    from llama_jax.formats.chat import ChatTemplate


# Names of arguments, which a variable of a template cannot have.
_TAKEN = {
    "self", "tokenizer", "template", "messages", "tools", "documents", "add_generation_prompt"
}  # fmt: skip


def start_chat(
    context: Context, body: ChatRequest, arrival: Arrival
) -> tuple[Generation, "type[ChatAnswer]"]:
    """A generation to enter and what its answer is. Raises ApiError for what the body asks."""
    settings = context.settings
    params = body.sampling()
    check_chat(context, body)
    params = within_ceilings(context, params)
    structure = None
    if body.response_format is not None:
        structure = body.response_format.structure(settings.max_schema_bytes)
    structure = _tool_structure(body, structure, settings.max_schema_bytes)

    def prepare(lease: Lease, unique: str) -> list[Request]:
        ids = chat_ids(lease, body)
        check_length(lease, len(ids), "messages")
        return [
            Request(
                id=unique,
                prompt_token_ids=tuple(ids),
                params=params,
                continues_text=False,
                adapter=lease.adapter,
                tenant=arrival.caller.tenant,
                priority=arrival.caller.priority,
                structure=structure,
            )
        ]

    field = "tools" if body.must_call else "response_format"
    generation = Generation(context, arrival, "chat", body.model, prepare, structure_field=field)
    return generation, ChatAnswer


def check_chat(context: Context, body: ChatRequest) -> None:
    """Raises ApiError for an empty or too long conversation, and for tools of one name."""
    settings = context.settings
    for name, items, limit in (
        ("messages", body.messages, settings.max_messages),
        ("tools", body.tools or [], settings.max_tools),
    ):
        if len(items) > limit:
            raise ApiError(400, f"{name} has {len(items)} entries, over {limit}", param=name)
    if not body.messages:
        raise ApiError(400, "messages is empty", param="messages")
    names = [tool.function.name for tool in body.tools or []]
    if len(set(names)) != len(names):
        raise ApiError(400, "tools has a name twice", param="tools")


def _tool_structure(body: ChatRequest, asked: Structure | None, max_bytes: int) -> Structure | None:
    """What the answer must match when a tool must be called, else `asked`."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(
                400, "tool_choice asks for a tool and tools is empty", param="tool_choice"
            )
        return asked
    if asked is not None and choice != "none":
        raise ApiError(
            400,
            "response_format and tools exclude each other; tool_choice 'none' keeps the first",
            param="response_format",
        )
    names = {tool.function.name for tool in body.tools}
    for name in body.tools_named or []:
        if name not in names:
            raise ApiError(
                400, f"tool_choice names {name!r}, which is no tool", param="tool_choice"
            )
    if not body.must_call:
        return asked
    parallel = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    try:
        schema = forced_schema(body.callable_tools, parallel=parallel)
    except RecursionError:
        raise ApiError(400, "tools has a schema nested too deeply", param="tools") from None
    if len(schema) > max_bytes:
        raise ApiError(400, f"the schemas of tools are over {max_bytes} bytes", param="tools")
    return Structure("json_schema", schema)


def chat_ids(lease: Lease, body: ChatRequest) -> list[int]:
    """The conversation as the model reads it. Raises ApiError."""
    from llama_jax.formats.chat import render_chat, with_begin

    tokenizer = lease.loaded.tokenizer
    if tokenizer is None:
        raise ApiError(400, f"{lease.loaded.name} has no tokenizer and cannot chat", param="model")
    # A tool that must be called is shown among all; of those not allowed nothing is said.
    is_subset = isinstance(body.tool_choice, AllowedToolChoice)
    shown = body.callable_tools if is_subset or body.tool_choice == "none" else body.tools
    tools = [tool.to_template() for tool in shown or []] or None
    variables = body.chat_template_kwargs or {}
    taken = sorted((_TAKEN | set(tokenizer.special_tokens)) & set(variables))
    if taken:
        raise ApiError(
            400,
            f"chat_template_kwargs has {', '.join(taken)}, which the request sets elsewhere or a "
            f"template may not have; leave it out",
            param="chat_template_kwargs",
        )
    try:
        rendered = render_chat(
            tokenizer,
            [message.to_template() for message in body.messages],
            add_generation_prompt=True,
            tools=tools,
            template=_template(lease, body, tools),
            **variables,
        )
    except ValueError as error:
        # Of the model's own template a client can mend the messages only.
        field = "messages" if body.chat_template is None else "chat_template"
        raise ApiError(400, str(error), param=field) from error
    check_text(lease, rendered.text, "messages")
    return with_begin(tokenizer, rendered.encode(tokenizer)[0])


def _template(
    lease: Lease, body: ChatRequest, tools: list[dict[str, Any]] | None
) -> "ChatTemplate":
    from llama_jax.formats.chat import chat_template

    tokenizer = lease.loaded.tokenizer
    assert tokenizer is not None
    asked, known = body.chat_template, tokenizer.chat_templates
    if asked is None:
        asked = lease.loaded.source.template
    elif asked not in known and "{" not in asked:
        raise ApiError(
            400,
            f"chat_template is {asked[:40]!r}, which is no template, and no name of one of "
            f"{lease.loaded.name}'s: {', '.join(sorted(known)) or 'it has none'}",
            param="chat_template",
        )
    template = chat_template(tokenizer, asked, tools=tools)
    if tools and "tools" not in template.source:
        raise ApiError(
            400, f"the chat template of {lease.loaded.name} does not know tools", param="tools"
        )
    return template


class ChatAnswer(Answer):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, generation: Generation, *, body: ChatRequest, **options: Any):
        super().__init__(generation, **options)
        self._wants_logprobs = bool(body.logprobs)
        self._n = generation.requests[0].params.n
        self._choices = {index: Choice() for index in range(self._n)}
        tools, parallel = body.callable_tools, body.parallel_tool_calls is not False
        self._parsers = {
            index: ToolParser(tools, parallel=parallel, must_call=body.must_call)
            for index in range(self._n if tools else 0)
        }
        # Log probabilities of tokens whose text is held back: they go out with the next chunk.
        self._held: dict[int, list[TokenLogprob]] = {index: [] for index in range(self._n)}

    def _chunk_choices(self, prompt: int, event: Started | Piece) -> Iterator[dict[str, Any]]:
        if isinstance(event, Started):
            for index in range(self._n):
                yield self._choice(index, {"role": "assistant", "content": ""})
            return
        index, text = event.index, event.text
        calls: list[dict[str, Any]] = []
        reason: str | None = event.finish_reason
        self._held[index] += event.logprobs
        parser = self._parsers.get(index)
        if parser is not None:
            text = parser.push(text)
            if reason is not None:
                rest, calls, reason = parser.finish(reason)
                text += rest
        if text:
            yield self._choice(index, {"content": text}, self._taken(index))
        if calls:
            numbered = [{"index": place, **call} for place, call in enumerate(calls)]
            yield self._choice(index, {"tool_calls": numbered}, self._taken(index))
        if reason is not None:
            # The end token has a log probability too, and no text.
            yield self._choice(index, {}, self._taken(index), reason)

    def _taken(self, index: int) -> list[TokenLogprob]:
        taken, self._held[index] = self._held[index], []
        return taken

    def _choice(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[TokenLogprob] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        shown = _logprobs(logprobs) if self._wants_logprobs and logprobs else None
        return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}

    def _gather(self, prompt: int, event: Started | Piece) -> None:
        if isinstance(event, Started):
            return
        choice = self._choices[event.index]
        choice.text.append(event.text)
        choice.logprobs += event.logprobs
        choice.finish_reason = event.finish_reason or choice.finish_reason

    def _whole_choices(self) -> list[dict[str, Any]]:
        return [self._whole_choice(index, choice) for index, choice in self._choices.items()]

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        calls: list[dict[str, Any]] = []
        reason: str | None = choice.finish_reason
        parser = self._parsers.get(index)
        if parser is not None:
            assert reason is not None
            text = parser.push(text)
            rest, calls, reason = parser.finish(reason)
            text += rest
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": _logprobs(choice.logprobs) if self._wants_logprobs else None,
            "finish_reason": reason,
        }


def _logprobs(entries: Any) -> dict[str, Any]:
    content = [
        {**_described(entry), "top_logprobs": [_described(each) for each in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _described(token: Alternative) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.bytes)}
