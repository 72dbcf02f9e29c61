"""What the server refuses of a body, in which words, and at what cost."""

import json
import re
import threading
import urllib.request

import pytest

from infer.server import rest, validation
from llama_jax.formats.chat import Rendered
from llama_jax.formats.tokenizer import Tokenizer
from tests.infer.server.running import (
    CHATS,
    MESSAGES,
    byte_tokenizer,
)


def test_stream_options_without_a_stream_are_refused(server):
    status, body, _ = server.chat(stream_options={"include_usage": True})
    assert (status, body["error"]["param"]) == (400, "stream_options")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),  # R100
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),  # R86
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),  # R95
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),  # R120
        ({"n": 17}, "n"),
        ({"best_of": 10**6}, "best_of"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"stop": ["x"] * 10**5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(10**5)}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        ({"logit_bias": {"4294967296": 1}}, "logit_bias"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"seed": 2**65}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"stream": "yes"}, "stream"),
        ({"suffix": "x"}, "suffix"),
        ({"tempratur": 1}, "tempratur"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
    ],
)
def test_wrong_values_are_refused_by_name_before_the_engine(server, fields, param):
    before = len(server.engine.seen)
    status, body, _ = server.complete(**fields)
    assert status == 400, body
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"
    assert len(server.engine.seen) == before


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"temperature": "hot"}, 'not "hot"'),
        ({"n": 2.5}, "not 2.5"),
        ({"stream": "perhaps"}, 'not "perhaps"'),
        ({"top_p": True}, "not true"),
        ({"max_tokens": "9" * 500}, 'not "' + "9" * 39 + "…"),
    ],
)
def test_a_refusal_says_what_was_given(server, fields, given):
    status, body, _ = server.chat(**fields)
    assert status == 400 and body["error"]["message"].endswith(given)


PART = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [{"role": "user", "content": [PART]}]}, '{"type": "text", "text": …}'),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
            '{"type": "text", "text": …}',
        ),
        ({"tool_choice": {}}, '"required", {"type": "function", "function": {"name": …}} or '),
        ({"tool_choice": "any"}, ', not "any"'),
        ({"stop": 5}, "stop: Input should be a text or a list of texts, not 5"),
        ({"messages": ["hi"]}, "messages.0: Input should be an object"),
        ({"messages": {}}, "messages: Input should be a list"),
        ({"prompt": [1, [2]]}, "a list of at most 1048576 token ids or a list of such lists"),
        ({"prompt": None}, "prompt: Input should be a text, a list of texts"),
        ({"input": None}, "input: Input should be a text, a list of texts"),
        ({"logit_bias": {"prompt": "x"}}, "logit_bias.prompt: Input should be a valid number"),
    ],
)
def test_where_several_types_are_allowed_all_are_told(server, fields, said):
    routes = {"prompt": "completions", "input": "embeddings"}
    path = "/v1/" + routes.get(next(iter(fields)), "chat/completions")
    given = {"messages": MESSAGES} if "chat" in path else {}
    status, body, _ = server.call(path, {"model": "m", **given, **fields})
    assert status == 400 and said in body["error"]["message"], body


def test_a_refusal_repeats_no_text(server):
    status, body, _ = server.call("/v1/chat/completions", {"model": "m", "messages": "my secret"})
    assert status == 400 and "secret" not in body["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [b'{"model":"m",', b"plain text", b"", b"[1, 2]", b"null", b'"x"', b"\xff\xfe", b"[" * 10**5],
)
def test_bodies_that_are_no_object_are_refused(server, raw):  # R100
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"):
        status, body, _ = server.call(path, raw=raw, method="POST")
        assert status == 400
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in json.dumps(body)


def many(entry):
    return ",".join([entry] * 10**5)


def numbered(value):
    return ",".join(f'"{name}": {value}' for name in range(10**5))


@pytest.mark.parametrize(
    ("field", "raw"),
    [
        ("prompt", f"[{many('[1]')}]"),
        ("prompt", f"[{many('1.5')}]"),
        ("stop", f"[{many('[]')}]"),
        ("logit_bias", "{" + numbered("[]") + "}"),
        ("messages", f"[{many('{}')}]"),
        ("messages", f'[{{"role": "user", "content": [{many("{}")}]}}]'),
        ("tools", f"[{many('{}')}]"),
        ("chat_template_kwargs", f'{{"a": [{{"b": [{many("[]")}]}}]}}'),
        (None, "1, " + numbered("1")),
    ],
)
def test_of_very_many_wrong_entries_few_are_read(server, monkeypatch, field, raw):
    told = []
    invalid = validation.invalid

    def counting(error):
        told.append(error.error_count())
        return invalid(error)

    monkeypatch.setattr(validation, "invalid", counting)
    path = "/v1/completions" if field in ("prompt", "stop", "logit_bias") else CHATS
    rest = f'{{"model": "m", "{"prompt" if path == CHATS else "messages"}": "x"'
    status, body, _ = server.call(path, raw=f'{rest}, "{field or "user"}": {raw}}}'.encode())
    assert status == 400 and body["error"]["param"] == (field or None), body
    assert sum(told) < 20


def test_a_body_of_very_many_containers_is_refused_before_any_is_made(server, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the body was read")

    many_lists = ",".join(["[]"] * 2**17)
    with monkeypatch.context() as patch:
        patch.setattr(validation, "from_json", refuse)
        for field in ("chat_template_kwargs", "prompt", "metadata"):
            raw = f'{{"model": "m", "{field}": {{"a": [{many_lists}]}}}}'.encode()
            status, body, _ = server.call(CHATS, raw=raw)
            assert status == 400 and "lists and objects; at most" in body["error"]["message"]
    # In a text they are text, whatever is escaped before them.
    for text in ("[]" * 2**17, '\\"[{' * 2**16 + "\\", '"' + "{" * 2**18):
        status, body, _ = server.complete(text)
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    # Of what does not end, all is text.
    for raw in (b'{"a": "' + b"[" * 2**18, b'"' + b'\\"[' * 2**17, b'"' + b"[" * 2**18 + b"\\"):
        status, body, _ = server.call(CHATS, raw=raw)
        assert (status, body["error"]["code"]) == (400, "invalid_json"), body


def test_long_bodies_and_texts_are_read_in_threads_of_their_own(server, monkeypatch):
    threads = []

    def parse(kind, raw):
        threads.append(threading.current_thread().name)
        return validation.parse(kind, raw)

    encode = Tokenizer.encode

    def noting(tokenizer, *args, **kwargs):
        threads.append(threading.current_thread().name)
        return encode(tokenizer, *args, **kwargs)

    monkeypatch.setattr(rest, "parse", parse)
    monkeypatch.setattr(Tokenizer, "encode", noting)
    for prompt, count in ([65] * 10, 0), ([65] * 50_000, 1), ("hi", 1), ("x" * 70_000, 1):
        threads.clear()
        assert server.complete(prompt)[0] == (200 if len(prompt) < 20 else 400)
        assert [name.startswith("texts") for name in threads].count(True) == count, threads
    threads.clear()
    assert server.call("/tokenize", {"model": "m", "prompt": "hi"})[0] == 200
    assert threads[1].startswith("texts")


def test_a_token_that_the_engine_has_not_is_named_by_its_field(server, monkeypatch):
    def refuse(*args):
        raise ValueError("prompt has the token id 999; ids are 0 to 258")

    monkeypatch.setattr(server.engine, "embed", refuse)
    monkeypatch.setattr(server.engine, "submit", refuse)
    for path, given, field in (
        ("/v1/embeddings", {"input": [999]}, "input"),
        ("/v1/embeddings", {"input": [[999], [1]]}, "input.0"),
        ("/v1/completions", {"prompt": [999]}, "prompt"),
        ("/v1/completions", {"prompt": [[999], [1]]}, "prompt.0"),
    ):
        status, body, _ = server.call(path, {"model": "m", **given})
        assert (status, body["error"]["param"]) == (400, field), body
        assert body["error"]["message"] == f"{field} has the token id 999; ids are 0 to 258"


def test_a_surrogate_alone_and_numbers_beyond_json_are_refused(server):
    for raw in (
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "x", "temperature": NaN}',
        b'{"model": "m", "prompt": "x", "temperature": 1e999}',
        b'{"model": "m", "prompt": "x", "logit_bias": {"5": Infinity}}',
    ):
        assert server.call("/v1/completions", raw=raw)[0] == 400, raw


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "",
        "../../outside",
        "/etc",
        "a/../../b",
        "a\\b",
        "m@2",
        "m@",
        "m:",
        "m@1:",
        "m:x",
        "m@1:..",
        "M",
    ],
)
def test_unknown_models_are_404_and_never_paths(server, name):  # R100, R116
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/embeddings", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        status, answer, _ = server.call(path, {"model": name, **body})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert server.call(f"/v1/models/{urllib.request.pathname2url(name)}")[0] in (
        404,
        200 if not name else 404,
    )


def test_of_several_prompts_the_wrong_one_is_named(server):
    for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        status, body, _ = server.call(path, {"model": "m", field: ["a", ""]})
        assert (status, body["error"]["param"]) == (400, f"{field}.1")
        assert body["error"]["message"] == f"{field}.1 has no tokens"
        status, body, _ = server.call(path, {"model": "m", field: [""]})
        assert (status, body["error"]["param"]) == (400, field)


def test_a_prompt_over_the_context_names_both_numbers(server):  # R94
    for length in (257, 300):
        status, body, _ = server.complete([65] * length)
        assert status == 400
        assert str(length) in body["error"]["message"] and "256" in body["error"]["message"]
        assert body["error"]["code"] == "context_length_exceeded"
    assert server.call("/v1/models")[1]["data"][0]["max_model_len"] == 256
    assert server.complete()[0] == 200


def test_a_text_too_long_by_far_is_refused_before_it_is_encoded(server, monkeypatch):  # R94
    longest = max(len(token) for token in byte_tokenizer().backend.get_vocab())
    text = "a" * (256 * longest + 1)
    least = r"the prompt has at least 2\d\d tokens; the context of m is 256"

    def encode(self, *args, **kwargs):
        raise AssertionError("encoded")

    monkeypatch.setattr(Tokenizer, "encode", encode)
    monkeypatch.setattr(Rendered, "encode", encode)
    for status, body, _ in (server.complete(text), server.chat(text)):
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert re.fullmatch(least, body["error"]["message"])


def test_too_many_choices_name_what_makes_them(server):
    status, body, _ = server.complete(["x"] * 17)
    assert (status, body["error"]["param"]) == (400, "prompt")
    assert "17 choices are asked for (n 1 of 17 prompts); the limit is 16" in str(body)
