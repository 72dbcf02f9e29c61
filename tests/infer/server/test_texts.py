"""The routes that generate nothing: embeddings, and tokens there and back."""

import pytest

from tests.infer.server.running import MESSAGES, byte_tokenizer


def test_conversations_to_tokenize_have_the_ceiling_of_chats(server):  # R120
    messages = [{"role": "user", "content": "x"}] * 1025
    status, body, _ = server.call("/tokenize", {"model": "m", "messages": messages})
    assert (status, body["error"]["param"]) == (400, "messages")
    assert body["error"]["message"] == "messages has 1025 entries, over 1024"


def test_embeddings_in_both_encodings(client, server):
    got = client.embeddings.create(model="m", input=["a", "abc"])  # asks for base64
    assert [row.embedding for row in got.data] == [[1.0, 1.0, -0.5], [3.0, 1.0, -0.5]]
    assert got.usage.prompt_tokens == 4
    status, body, _ = server.call("/v1/embeddings", {"model": "m", "input": [1, 2]})
    assert status == 200 and body["data"][0]["embedding"] == [2.0, 1.0, -0.5]
    for wrong in (
        {"input": []},
        {"input": ""},
        {"input": "a", "dimensions": 5},
        {"input": [1] * 257},
    ):
        assert server.call("/v1/embeddings", {"model": "m", **wrong})[0] == 400


def test_tokens_there_and_back(server):  # R26
    text = "wait ! it 's (a , b) . ?"
    tokens = server.call("/tokenize", {"model": "m", "prompt": text})[1]
    assert tokens["count"] == len(tokens["tokens"])
    back = server.call("/detokenize", {"model": "m", "tokens": tokens["tokens"]})[1]
    assert back == {"prompt": text}
    status, body, _ = server.call("/tokenize", {"model": "m", "messages": MESSAGES})
    server.chat("hi")
    assert status == 200 and tuple(body["tokens"]) == server.engine.seen[-1].prompt_token_ids
    for wrong in ({}, {"prompt": "a", "messages": MESSAGES}):
        assert server.call("/tokenize", {"model": "m", **wrong})[0] == 400
    for unknown in (-1, 10**6, 2**40):
        status, body, _ = server.call("/detokenize", {"model": "m", "tokens": [unknown]})
        assert status == 400 and str(unknown) in body["error"]["message"]


TOOL_LISTING = {
    "messages": MESSAGES,
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    "chat_template": "{{ tools | tojson }}{{ mood }}"
    "{% for message in messages %}{{ message.content }}{% endfor %}",
    "chat_template_kwargs": {"mood": "calm"},
}


def test_a_conversation_is_tokenized_with_the_tools_and_the_template_of_the_chat(server):
    body = {"model": "m", **TOOL_LISTING}
    status, answer, _ = server.call("/tokenize", body)
    assert status == 200 and server.call("/v1/chat/completions", body)[0] == 200
    assert tuple(answer["tokens"]) == server.engine.seen[-1].prompt_token_ids
    assert '"name": "add"' in byte_tokenizer().decode(answer["tokens"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        *(
            ({"prompt": "x", name: TOOL_LISTING[name]}, name)
            for name in ("tools", "chat_template", "chat_template_kwargs")
        ),
        ({"messages": []}, "messages"),
        ({**TOOL_LISTING, "tools": 2 * TOOL_LISTING["tools"]}, "tools"),
        ({**TOOL_LISTING, "chat_template": "nameless"}, "chat_template"),
        ({**TOOL_LISTING, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_a_conversation_to_tokenize_may_not_say_is_named(server, body, param):
    status, answer, _ = server.call("/tokenize", {"model": "m", **body})
    assert (status, answer["error"]["param"]) == (400, param)
