"""Between gRPC's messages and the bodies and objects of REST.

The message types are made from the compiled description at run time: generated Python code is
bound to one major version of protobuf, a description to none.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.message import DecodeError, Message

from infer.completion import Alternative
from infer.server.answers import token_text
from infer.server.errors import ApiError

SERVICE = "llama_jax.v1.Inference"
_COMPILED = Path(__file__).parent / "inference.binpb"


@functools.cache
def service() -> Any:
    """The descriptor of the service, in protobuf's default pool, where reflection looks."""
    files = descriptor_pb2.FileDescriptorSet.FromString(_COMPILED.read_bytes())
    pool = descriptor_pool.Default()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool.FindServiceByName(SERVICE)


@functools.cache
def message_class(name: str) -> type[Message]:
    pool = service().file.pool
    found: type[Message] = message_factory.GetMessageClass(
        pool.FindMessageTypeByName(f"llama_jax.v1.{name}")
    )
    return found


def parse_message(kind: type[Message], raw: bytes) -> Message:
    """Raises ApiError for bytes that are no such message."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise ApiError(400, f"the message is no {kind.DESCRIPTOR.name}: {error}") from error


def _as_dict(message: Message) -> dict[str, Any]:
    """Only what was set, under the names of the .proto file."""
    values: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return values


def _body(values: dict[str, Any]) -> dict[str, Any]:
    """With the groups of the message as the fields that REST has in their place."""
    unpacked = {**_response_format(values), **_sampling(values)}
    # What is empty is not sent, and a model must be named.
    return {"model": "", **values, **unpacked}


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = values.pop("sampling", {})
    if "seed" in sampling:
        # JSON has no 64-bit integers in protobuf's eyes, so it is a text here.
        sampling["seed"] = int(sampling["seed"])
    for name in ("temperature", "top_p", "min_p"):
        if isinstance(sampling.get(name), str):
            raise ApiError(400, f"{name} is not a finite number", param=name)
    return sampling


def _response_format(values: dict[str, Any]) -> dict[str, Any]:
    given = values.pop("response_format", None)
    if not given:
        return {}
    [(kind, value)] = given.items()
    if kind == "json_object" and not value:
        return {}
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if kind == "json_schema":
        schema = {"name": "schema", "schema": _json("response_format.json_schema", value)}
        return {"response_format": {"type": kind, "json_schema": schema}}
    return {"response_format": {"type": kind, kind: value}}


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{where} is not JSON: {error}", param=where) from error


def completion_body(message: Message) -> dict[str, Any]:
    """The body of REST that asks the same. Raises ApiError."""
    values = _as_dict(message)
    ids = values.pop("prompt_token_ids", None)
    if ids is not None:
        values["prompt"] = ids.get("ids", [])
    return _body(values)


def chat_body(message: Message) -> dict[str, Any]:
    values = _as_dict(message)
    values["messages"] = _messages(values)
    _read_template(values)
    choice, allowed = values.pop("tool_choice", ""), values.pop("allowed_tools", None)
    if allowed is not None:
        values["tool_choice"] = _allowed(allowed, choice)
    elif choice in ("none", "auto", "required"):
        values["tool_choice"] = choice
    elif choice:
        values["tool_choice"] = {"type": "function", "function": {"name": choice}}
    if "top_logprobs" in values:
        values["logprobs"] = True
    return _body(values)


def _messages(values: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = values.get("messages", [])
    for each in messages:
        # A text that is empty is not sent.
        each.setdefault("content", "")
        for call in each.get("tool_calls", []):
            call["type"] = "function"
            call.get("function", {}).setdefault("arguments", "{}")
    return messages


def _read_template(values: dict[str, Any]) -> None:
    """What a template is given beside messages, from text. Raises ApiError."""
    if "tools" in values:
        values["tools"] = [_tool(each) for each in values["tools"]]
    if "chat_template_kwargs" in values:
        values["chat_template_kwargs"] = _json(
            "chat_template_kwargs", values["chat_template_kwargs"]
        )


def _allowed(allowed: dict[str, Any], choice: str) -> dict[str, Any]:
    mode, names = allowed.get("mode", ""), allowed.get("names", [])
    if choice:
        raise ApiError(
            400,
            f"tool_choice is {choice[:64]!r} beside allowed_tools; send one of them",
            param="tool_choice",
        )
    if mode not in ("auto", "required") or not names:
        raise ApiError(
            400,
            f"allowed_tools has the mode {mode[:64]!r} and {len(names)} names; the mode is 'auto' "
            f"or 'required', and at least one name must be given",
            param="allowed_tools",
        )
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def embedding_body(message: Any) -> dict[str, Any]:
    return {"model": message.model, "input": list(message.input)}


def tokenize_body(message: Any) -> dict[str, Any]:
    values = _as_dict(message)
    if "messages" in values:
        values["messages"] = _messages(values)
    else:
        values.setdefault("prompt", "")
    _read_template(values)
    return {"model": "", **values}


def detokenize_body(message: Any) -> dict[str, Any]:
    return {
        "model": message.model,
        "tokens": list(message.tokens),
        "skip_special_tokens": message.skip_special_tokens,
    }


def _tool(values: dict[str, Any]) -> dict[str, Any]:
    if "parameters" in values:
        values["parameters"] = _json("tools.parameters", values["parameters"])
    return {"type": "function", "function": values}


def completion_message(answer: Mapping[str, Any]) -> Message:
    """A whole completion, or a chunk of one."""
    choices = []
    for choice in answer["choices"]:
        row = {"index": choice["index"], "text": choice["text"], **_reason(choice)}
        logprobs = choice["logprobs"]
        if logprobs is not None:
            tops = logprobs["top_logprobs"] or [None] * len(logprobs["tokens"])
            entries = zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
            row["logprobs"] = [
                {"token": token, "logprob": logprob, "top": top} for token, logprob, top in entries
            ]
        choices.append(row)
    return _answer("Completion", answer, choices)


def chat_message(answer: Mapping[str, Any]) -> Message:
    """A whole chat completion, or a chunk of one."""
    choices = []
    for choice in answer["choices"]:
        said = choice.get("message", choice.get("delta"))
        message = {name: said[name] for name in ("role", "content") if said.get(name)}
        if said.get("tool_calls"):
            message["tool_calls"] = [
                {"id": call["id"], "function": call["function"]} for call in said["tool_calls"]
            ]
        row = {"index": choice["index"], "message": message, **_reason(choice)}
        if choice["logprobs"] is not None:
            row["logprobs"] = [
                {
                    "token": _token_text(entry),
                    "logprob": entry["logprob"],
                    "top": {_token_text(top): top["logprob"] for top in entry["top_logprobs"]},
                }
                for entry in choice["logprobs"]["content"]
            ]
        choices.append(row)
    return _answer("ChatCompletion", answer, choices)


def _token_text(entry: Mapping[str, Any]) -> str:
    """As in a completion: bytes that are no whole characters would all look alike."""
    raw = bytes(entry["bytes"])
    return token_text(Alternative(-1, entry["token"], raw, entry["logprob"]))


def _reason(choice: Mapping[str, Any]) -> dict[str, Any]:
    reason = choice["finish_reason"]
    return {} if reason is None else {"finish_reason": reason}


def _answer(name: str, answer: Mapping[str, Any], choices: list[dict[str, Any]]) -> Message:
    usage = answer.get("usage")
    values = {
        "id": answer["id"],
        "model": answer["model"],
        "version": answer["system_fingerprint"],
        "choices": choices,
        "usage": None if usage is None else to_usage(usage),
    }
    return json_format.ParseDict(values, message_class(name)())


def to_usage(usage: Mapping[str, Any]) -> dict[str, int]:
    """REST's usage object as the fields of Usage."""
    counts = {name: usage.get(name, 0) for name in ("prompt_tokens", "total_tokens")}
    counts["completion_tokens"] = usage.get("completion_tokens", 0)
    counts["cached_tokens"] = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return counts


def to_message(name: str, values: dict[str, Any]) -> Message:
    return json_format.ParseDict(values, message_class(name)())
