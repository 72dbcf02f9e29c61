"""The two generation routes and their streams, as clients see them."""

import json
import urllib.request

import pytest

from infer.server.loaded import Built
from tests.infer.server.running import (
    MESSAGES,
    byte_tokenizer,
    events_of,
    running,
    until,
    word_server,
)
from tests.infer.server.scripted_engine import ScriptedEngine


def test_the_openai_client_lists_models_and_chats(client, server):
    assert [(m.id, m.max_model_len, m.version) for m in client.models.list()] == [("m", 256, "1")]
    assert client.models.retrieve("m").id == "m"
    answer = client.chat.completions.create(model="m", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.system_fingerprint == "m@1"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    text = client.completions.create(model="m", prompt="x").choices[0].text
    assert text == "Hello there"


def test_the_openai_client_streams(client):
    stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello there"
    stream = client.completions.create(model="m", prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello there"


def test_a_chat_stream_has_its_parts_in_order(server):  # R98
    *chunks, done = events_of(server, "/v1/chat/completions", {"messages": MESSAGES})
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(each["delta"]) == {"content"} for each in choices[1:-1])
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    assert all(each["finish_reason"] is None for each in choices[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(server, path):  # R99
    body = {"messages": MESSAGES} if "chat" in path else {"prompt": "hi"}
    options = {"stream_options": {"include_usage": True}}
    *chunks, last, done = events_of(server, path, {**body, **options})
    assert done == "[DONE]"
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    whole = server.call(path, {"model": "m", **body})[1]
    assert last["usage"] == whole["usage"]
    assert last["usage"]["completion_tokens"] == 12  # the end token is one


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stop_string_over_several_tokens_never_shows(path, stream):  # R93
    said = ["STR", "UV", "WX", "Y", "Z!"]
    with word_server(["hi", *said], said) as server:
        body = {"messages": MESSAGES} if "chat" in path else {"prompt": "hi"}
        body["stop"] = "UVWXYZ"
        if stream:
            *chunks, _ = events_of(server, path, body)
            choices = [chunk["choices"][0] for chunk in chunks]
            texts = [c.get("text", c.get("delta", {}).get("content") or "") for c in choices]
            assert "".join(texts) == "STR"
            assert choices[-1]["finish_reason"] == "stop"
        else:
            choice = server.call(path, {"model": "m", **body})[1]["choices"][0]
            assert (choice.get("text") or choice["message"]["content"]) == "STR"
            assert choice["finish_reason"] == "stop"


def test_characters_are_never_split_between_events():  # R24, R25, R98
    text = "안 👍 \u2028 é"
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)

    def build(source):
        return Built(ScriptedEngine(tokenizer, lambda request, index: ids), tokenizer)

    with running(build) as server:
        *chunks, _ = events_of(server, "/v1/completions", {"prompt": "x"})
        pieces = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert server.complete()[1]["choices"][0]["text"] == text
        # A line separator inside JSON must not end a line for clients that know it.
        request = urllib.request.Request(
            server.url + "/v1/completions",
            data=json.dumps({"model": "m", "prompt": "x", "stream": True}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            assert response.read().isascii()


def test_n_choices_are_numbered_and_prompts_come_after_each_other(server):
    body = server.complete(["a", "b"], n=2)[1]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 4 * 12
    chunks = events_of(server, "/v1/chat/completions", {"messages": MESSAGES, "n": 3})[:-1]
    texts = dict.fromkeys(range(3), "")
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert set(texts.values()) == {"Hello there"}


def test_prompts_may_be_token_ids(server):
    ids = byte_tokenizer().encode("abc", add_special_tokens=False)
    server.complete(ids)
    assert server.engine.seen[-1].prompt_token_ids == tuple(ids)
    server.complete([ids, [5]])
    assert [r.prompt_token_ids for r in server.engine.seen[-2:]] == [tuple(ids), (5,)]


def test_logprobs_in_both_forms(server):  # R91, R92
    choice = server.complete("ab", logprobs=2, echo=True, max_tokens=2)[1]["choices"][0]
    assert choice["text"] == "abHe"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "H", "e"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [-0.5, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"][2] == {"H": -0.5, "\x00": -2.0}
    content = server.chat(logprobs=True, top_logprobs=3)[1]["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content[:3]] == ["H", "e", "l"]
    assert content[0]["bytes"] == [72]
    assert len(content[0]["top_logprobs"]) == 3
    chunks = events_of(
        server, "/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "max_tokens": 3}
    )[1:-2]
    assert [c["choices"][0]["logprobs"]["content"][0]["token"] for c in chunks] == ["H", "e", "l"]


def test_the_first_token_of_an_echoed_prompt_is_written_as_the_others(server):
    prompt = list("é".encode())
    logprobs = server.complete(prompt, logprobs=0, echo=True, max_tokens=0)[1]["choices"][0][
        "logprobs"
    ]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_zero_tokens_are_an_empty_completion(server):  # R95
    body = server.complete("ab", max_tokens=0)[1]
    assert body["choices"][0]["text"] == "" and body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    assert server.complete("ab", max_tokens=10**9)[0] == 200


def test_the_ceiling_of_tokens_holds_for_who_does_not_ask():  # R95
    with running(max_tokens=5) as server:  # "Hello there" has 11 tokens
        for fields in ({}, {"max_tokens": None}, {"max_tokens": 5}, {"min_tokens": 2}):
            for status, body, _ in (server.complete("x", **fields), server.chat("x", **fields)):
                assert status == 200 and body["usage"]["completion_tokens"] == 5
        for name in ("max_tokens", "min_tokens"):
            status, body, _ = server.complete("x", **{name: 6})
            assert (status, body["error"]["param"]) == (400, name)
            assert body["error"]["message"] == f"{name} is 6; the limit is 5"
    with running(max_tokens=1000) as server:  # which is no reason for more than 256
        assert server.complete("x")[0] == 200
        assert server.engine.seen[-1].params.max_tokens is None


def test_the_answer_and_the_metrics_carry_the_version(server):
    _, body, headers = server.chat()
    assert body["system_fingerprint"] == headers["x-llama-jax-version"] == "m@1"
    until(lambda: server.metric("llama_jax_requests_total", model="m", version="1") > 0)
    assert server.metric("llama_jax_time_to_first_token_seconds_count", version="1") > 0
    assert server.metric("llama_jax_time_per_output_token_seconds_count", version="1") > 0
    assert server.metric("llama_jax_completion_tokens_total", model="m") > 0
    assert server.metric("llama_jax_cache_blocks") == 100


def test_structures_reach_the_engine(server):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for asked, kind, source in (
        ({"type": "json_object"}, "json_object", ""),
        (
            {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}},
            "json_schema",
            json.dumps(schema),
        ),
        ({"type": "regex", "regex": "a+"}, "regex", "a+"),
        ({"type": "grammar", "grammar": "start: /a/"}, "grammar", "start: /a/"),
    ):
        assert server.chat(response_format=asked)[0] == 200
        assert server.complete(response_format=asked)[0] == 200
        for request in server.engine.seen[-2:]:
            assert (request.structure.kind, request.structure.source) == (kind, source)
    assert server.chat(response_format={"type": "text"})[0] == 200
    assert server.engine.seen[-1].structure is None
    assert server.chat(response_format={"type": "regex", "regex": "a" * 70_000})[0] == 400
