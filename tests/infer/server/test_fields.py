"""Every field of a request is read, or listed as one that changes nothing."""

import builtins
import types
import typing
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from infer.server import api_types
from infer.server.api_types import IGNORED
from infer.server.strict import StrictBody
from tests.infer.server.running import MESSAGES


def test_every_parameter_reaches_the_engine(server):
    given = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.75,
        "n": 2,
        "stop": ["q", "z"],
        "seed": 11,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.5,
        "logit_bias": {"65": 2.5},
        "top_k": 9,
        "min_p": 0.125,
        "repetition_penalty": 1.25,
        "min_tokens": 3,
        "ignore_eos": True,
    }
    assert server.complete(logprobs=4, echo=True, **given)[0] == 200
    params = server.engine.seen[-1].params
    expected = {**given, "stop": ("q", "z"), "logit_bias": {65: 2.5}, "logprobs": 4, "echo": True}
    assert {name: getattr(params, name) for name in expected} == expected
    assert server.chat(**given, logprobs=True, top_logprobs=2)[0] == 200
    params = server.engine.seen[-1].params
    assert params.logprobs == 2 and not params.echo
    assert server.engine.seen[-1].continues_text is False
    assert server.chat(max_completion_tokens=5)[0] == 200
    assert server.engine.seen[-1].params.max_tokens == 5


def test_null_is_as_if_left_out(server):
    names = ("max_tokens", "temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream")
    assert server.chat(**dict.fromkeys(names), user=None, tools=None)[0] == 200
    assert server.engine.seen[-1].params == server.engine.seen[0].params.replace(
        temperature=1.0, max_tokens=None
    )


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/tokenize", {"prompt": "x", "add_special_tokens": None, "messages": None}),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": None, "prompt": None}),
        ("/detokenize", {"tokens": [65], "skip_special_tokens": None}),
        ("/v1/embeddings", {"input": "x", "encoding_format": None, "dimensions": None}),
        (
            "/v1/completions",
            {
                "prompt": "x",
                "stream": True,
                "stream_options": {"include_usage": None, "include_obfuscation": None},
            },
        ),
    ],
)
def test_null_is_as_if_left_out_on_every_route(server, path, fields):
    left = {name: value for name, value in fields.items() if value is not None}
    left.pop("stream_options", None)
    answers = [server.call(path, {"model": "m", **each}) for each in (fields, left)]
    assert [status for status, *_ in answers] == [200, 200], answers
    if path != "/v1/completions":
        assert answers[0][1] == answers[1][1]


def test_fields_that_change_nothing_are_accepted(server):
    names = [name for name in IGNORED if "." not in name and name != "modalities"]
    given = dict.fromkeys(names, "x") | {"metadata": {"a": "b"}, "store": True}
    given["prompt_cache_options"] = {"mode": "explicit", "ttl": "30m"}
    assert server.chat(**given, modalities=["text"])[0] == 200
    assert server.complete(**given)[0] == 200


# Between them, every field that a request may have.
BODIES = {
    "/v1/chat/completions": [
        {"messages": [*MESSAGES, {"role": "assistant", "content": "", "name": "x", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]}],
         "tools": [{"type": "function", "function": {"name": "f"}}],
         "tool_choice": {"type": "function", "function": {"name": "f"}},
         "chat_template": "{{ tools }}", "stream": True, "stream_options": {"include_usage": True}},
        {"messages": MESSAGES, "response_format": {
            "type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}],
         "chat_template": "{{ tools }}", "tool_choice": {
             "type": "allowed_tools", "allowed_tools": {
                 "mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}}},
    ],
    "/v1/completions": [
        {"prompt": "x", "n": 1, "best_of": 1, "response_format": {"type": "regex", "regex": "x"}},
        {"prompt": "x", "response_format": {"type": "grammar", "grammar": "start: \"x\""}},
        {"prompt": "x", "response_format": {
            "type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}},
    ],
    "/v1/embeddings": [{"input": "x"}],
    "/tokenize": [{"prompt": "x"}, {"messages": MESSAGES}],
    "/detokenize": [{"tokens": [65]}],
}  # fmt: skip


def kinds_of(annotation):
    """The types and the fixed words that a value may be."""
    inner = get_args(annotation)
    match get_origin(annotation):
        case typing.Annotated:
            return kinds_of(inner[0])
        case typing.Literal:
            return set(inner)
        case typing.Union | types.UnionType:
            return set().union(*map(kinds_of, inner)) - {types.NoneType}
        case builtins.list:
            return {list} | kinds_of(inner[0])
    return {annotation} - {types.NoneType}


def fields_of(body, path=""):
    """(path, class, name) of each field that may be more than one word, however deep it lies."""
    for name, field in body.model_fields.items():
        own, kinds = f"{path}{field.alias or name}", kinds_of(field.annotation)
        if len(kinds) > 1 or any(not isinstance(kind, str) for kind in kinds):
            yield own, body.__name__, name
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields_of(kind, f"{own}.")


def test_every_field_is_read_or_listed_as_one_that_changes_nothing(server, monkeypatch):
    read = set()

    def noting(body, name):
        read.add((type(body).__name__, name))
        return object.__getattribute__(body, name)

    monkeypatch.setattr(StrictBody, "__getattribute__", noting, raising=False)
    for path, bodies in BODIES.items():
        for body in bodies:
            assert server.call(path, {"model": "m", **body})[0] == 200, (path, body)
    kinds = (
        api_types.ChatRequest,
        api_types.CompletionRequest,
        api_types.EmbeddingRequest,
        api_types.TokenizeRequest,
        api_types.DetokenizeRequest,
    )
    unread = {
        path for kind in kinds for path, owner, name in fields_of(kind) if (owner, name) not in read
    }
    assert unread == set(IGNORED)
