"""gRPC: the same answers, keys and limits as REST; health and reflection."""

import json
import threading
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import infer.server
from infer.server import rpc, validation
from infer.server.loaded import Built
from infer.server.rpc_messages import SERVICE, message_class, service
from infer.server.settings import Secret, Tenant
from llama_jax.formats.tokenizer import load_tokenizer
from tests.formats import text_fixtures
from tests.infer.server.running import byte_tokenizer, running, until
from tests.infer.server.scripted_engine import ScriptedEngine, saying
from tests.infer.server.test_operation import KEY, slow

FOLDER = Path(infer.server.__file__).parent
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Client:
    """Calls by method name, from the service's own description."""

    def __init__(self, server, *, key=None):
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.address.grpc_port}", OPTIONS)
        self.metadata = [] if key is None else [("authorization", f"Bearer {key}")]

    def __call__(self, name, timeout=20, raw=None, **fields):
        method = service().methods_by_name[name]
        make = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        call = make(
            f"/{SERVICE}/{name}",
            request_serializer=lambda given: (
                given if isinstance(given, bytes) else given.SerializeToString()
            ),
            response_deserializer=message_class(method.output_type.name).FromString,
        )
        request = raw if raw is not None else message_class(method.input_type.name)(**fields)
        return call(request, timeout=timeout, metadata=self.metadata)


@pytest.fixture(scope="module")
def server():
    with running(grpc_port=0) as running_server:
        yield running_server


@pytest.fixture
def client(server):
    made = Client(server)
    yield made
    made.channel.close()


def refused(call):
    with pytest.raises(grpc.RpcError) as raised:
        list(call) if hasattr(call, "__iter__") else call()
    return raised.value


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"])
@pytest.mark.parametrize("name", ["Complete", "StreamComplete", "Embed"])
def test_bytes_that_are_no_message_are_refused(client, name, raw):  # R100
    error = refused(lambda: list(client(name, raw=raw)))
    assert (
        error.code() == grpc.StatusCode.INVALID_ARGUMENT and "the message is no" in error.details()
    )


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


DEEP = {"name": "f", "parameters": '{"allOf": [' * 400 + "]}" * 400}


def test_the_compiled_description_is_that_of_the_source(tmp_path):
    from grpc_tools import protoc

    out = tmp_path / "out.binpb"
    arguments = [f"-I{FOLDER}", f"--descriptor_set_out={out}", "inference.proto"]
    assert protoc.main(["protoc", *arguments]) == 0
    fresh = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    kept = descriptor_pb2.FileDescriptorSet.FromString((FOLDER / "inference.binpb").read_bytes())
    assert fresh == kept


def test_generation_whole_and_streamed_is_that_of_rest(client, server):
    whole = client("Complete", model="m", prompt="hi")
    rest = server.complete()[1]
    assert whole.choices[0].text == rest["choices"][0]["text"]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.version == "m@1"
    assert whole.usage.completion_tokens == rest["usage"]["completion_tokens"]
    *pieces, last = client("StreamComplete", model="m", prompt="hi")
    assert "".join(piece.choices[0].text for piece in pieces) == "Hello there"
    assert last.usage == whole.usage and not last.choices
    answer = client("Chat", **CHAT)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == (
        "assistant",
        "Hello there",
    )
    pieces = list(client("StreamChat", **CHAT))
    assert pieces[0].choices[0].message.role == "assistant"
    assert "".join(p.choices[0].message.content for p in pieces if p.choices) == "Hello there"


def test_parameters_reach_the_engine(client, server):
    sampling = {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.75, "top_k": 9, "min_p": 0.125,
        "repetition_penalty": 1.25, "frequency_penalty": 0.25, "presence_penalty": -0.5,
        "seed": 2**40, "stop": ["q"], "n": 2, "logit_bias": {65: 2.5}, "min_tokens": 3,
        "ignore_eos": True,
    }  # fmt: skip
    whole = client(
        "Complete", model="m", prompt_token_ids={"ids": [1, 2]}, sampling=sampling,
        logprobs=2, echo=True, response_format={"json_schema": '{"minItems": 1}'},
    )  # fmt: skip
    request = server.engine.seen[-1]
    assert request.prompt_token_ids == (1, 2)
    for name, value in {**sampling, "stop": ("q",), "logprobs": 2, "echo": True}.items():
        assert getattr(request.params, name) == value, name
    assert json.loads(request.structure.source) == {"minItems": 1}
    first, second, *_ = whole.choices[0].logprobs
    assert not first.HasField("logprob") and second.logprob == -0.5
    assert len(second.top) == 2
    client("Chat", **CHAT, top_logprobs=1, sampling={"temperature": 0})
    assert server.engine.seen[-1].params.temperature == 0
    assert server.engine.seen[-1].params.logprobs == 1


def test_tokens_that_are_no_characters_are_told_apart():
    tokenizer = byte_tokenizer()
    text = "é"
    with running(grpc_port=0, engine_options={"script": saying(tokenizer, text)}) as server:
        client = Client(server)
        chat = client("Chat", **CHAT, top_logprobs=2).choices[0].logprobs
        whole = client("Complete", model="m", prompt="x", logprobs=2).choices[0].logprobs
        client.channel.close()
    assert [entry.token for entry in chat[:2]] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert [(e.token, dict(e.top)) for e in chat] == [(e.token, dict(e.top)) for e in whole]


TOOLS = [{"name": "f", "parameters": '{"type": "object"}'}, {"name": "g"}]
SEEN = "{{ tools | map(attribute='function.name') | join(',') }}{{ x }}{{ messages[-1].content }}"
TOLD = {"tools": TOOLS, "chat_template": SEEN, "chat_template_kwargs": '{"x": "!"}'}


def test_some_of_the_tools_may_be_allowed_as_over_rest(client, server):
    def ask(**fields):
        list(client("StreamChat", **CHAT, **TOLD, **fields))
        request = server.engine.seen[-1]
        return bytes(request.prompt_token_ids).decode(), request.structure

    assert ask() == ("f,g!hi", None)
    assert ask(allowed_tools={"mode": "auto", "names": ["g"]}) == ("g!hi", None)
    prompt, structure = ask(allowed_tools={"mode": "required", "names": ["g"]})
    [one] = json.loads(structure.source)["items"]["anyOf"]
    assert (prompt, one["properties"]["name"]) == ("g!hi", {"const": "g"})
    # What older clients send.
    prompt, structure = ask(tool_choice="required")
    assert prompt == "f,g!hi" and len(json.loads(structure.source)["items"]["anyOf"]) == 2
    _, structure = ask(tool_choice="required", parallel_tool_calls=False)
    assert len(json.loads(structure.source)["anyOf"]) == 2
    assert ask(tool_choice="none")[0] == "!hi"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"allowed_tools": {"mode": "auto", "names": ["x"]}}, "tool_choice names 'x'"),
        ({"allowed_tools": {"mode": "none", "names": ["f"]}}, "the mode 'none' and 1 names"),
        ({"allowed_tools": {"mode": "auto"}}, "the mode 'auto' and 0 names"),
        ({"allowed_tools": {}}, "the mode '' and 0 names"),
        (
            {"allowed_tools": {"mode": "auto", "names": ["f"]}, "tool_choice": "f"},
            "tool_choice is 'f' beside allowed_tools",
        ),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs is not JSON"),
        ({"chat_template_kwargs": "[]"}, "chat_template_kwargs: Input should be an object"),
    ],
)
def test_what_cannot_be_allowed_is_refused(client, fields, said):
    error = refused(lambda: client("Chat", **CHAT, **{**TOLD, **fields}))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and said in error.details()


def test_the_model_sees_what_it_refused(client, server):
    turns = [*CHAT["messages"], {"role": "assistant", "refusal": "no"}]
    client("Chat", model="m", messages=turns, chat_template="{{ messages[-1].content }}")
    assert bytes(server.engine.seen[-1].prompt_token_ids) == b"no"
    turns = [{"role": "user", "content": "x", "refusal": "no"}]
    assert (
        "refusal goes only" in refused(lambda: client("Chat", model="m", messages=turns)).details()
    )


def test_a_message_may_be_an_empty_text(client):
    messages = [{"role": "user", "content": ""}]
    assert client("Chat", model="m", messages=messages).choices[0].message.content
    error = refused(lambda: client("Chat", model="m", messages=[{"role": "tool", "content": "x"}]))
    assert "tool_call_id" in error.details()


def test_the_other_calls(client):
    assert [(m.id, m.max_model_len) for m in client("ListModels").data] == [("m", 256)]
    answer = client("Embed", model="m", input=["a", "abc"])
    assert [list(row.values) for row in answer.data] == [[1.0, 1.0, -0.5], [3.0, 1.0, -0.5]]
    answer = client("Tokenize", model="m", prompt="hé")
    again = client("Detokenize", model="m", tokens=answer.tokens)
    assert (again.prompt, answer.version, again.version) == ("hé", "m@1", "m@1")


def test_a_conversation_is_tokenized_as_over_rest(client, server):
    turns = [*CHAT["messages"], {"role": "assistant", "content": "é"}]
    wanted = server.call("/tokenize", {"model": "m", "messages": turns})[1]["tokens"]
    assert list(client("Tokenize", model="m", messages=turns).tokens) == wanted
    template = "{{ tools | tojson }}{{ mood }}{{ messages[0].content }}"
    tool = {"name": "add", "description": "adds", "parameters": '{"type": "object"}'}
    listed = {"messages": turns, "chat_template": template}
    over_rest = {"type": "function", "function": {**tool, "parameters": {"type": "object"}}}
    body = {"model": "m", **listed, "tools": [over_rest], "chat_template_kwargs": {"mood": "calm"}}
    fields = {"model": "m", **listed, "tools": [tool], "chat_template_kwargs": '{"mood": "calm"}'}
    wanted = server.call("/tokenize", body)[1]["tokens"]
    assert list(client("Tokenize", **fields).tokens) == wanted
    error = refused(lambda: client("Tokenize", model="m", messages=turns, prompt="x"))
    assert "give either prompt or messages" in error.details()
    assert not client("Tokenize", model="m").tokens


def test_special_tokens_come_and_go_as_over_rest(tmp_path):
    tokenizer = load_tokenizer(text_fixtures.llama3_folder(tmp_path))
    begin = tokenizer.bos_token_id

    def build(source):
        return Built(ScriptedEngine(tokenizer, lambda request, index: [65]), tokenizer)

    with running(build, grpc_port=0) as server:
        client = Client(server)
        try:
            for chosen in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
                fields = {"model": "m", "prompt": "hi", **chosen}
                wanted = server.call("/tokenize", fields)[1]["tokens"]
                assert (wanted[0] == begin) == chosen.get("add_special_tokens", True)
                assert list(client("Tokenize", **fields).tokens) == wanted
            for skip in (False, True):
                fields = {"model": "m", "tokens": [begin, wanted[0]], "skip_special_tokens": skip}
                text = server.call("/detokenize", fields)[1]["prompt"]
                assert client("Detokenize", **fields).prompt == text
                assert text.startswith("<|begin_of_text|>") != skip
        finally:
            client.channel.close()


@pytest.mark.parametrize(
    ("method", "fields", "code"),
    [
        ("Complete", {"model": "../../outside", "prompt": "x"}, "NOT_FOUND"),  # R116
        ("Complete", {"model": "a\\b", "prompt": "x"}, "NOT_FOUND"),
        ("Complete", {"model": "", "prompt": "x"}, "NOT_FOUND"),
        ("StreamChat", {**CHAT, "model": "/etc"}, "NOT_FOUND"),
        ("Complete", {"model": "m"}, "INVALID_ARGUMENT"),
        ("Complete", {"model": "m", "prompt": ""}, "INVALID_ARGUMENT"),
        ("Complete", {"model": "m", "prompt_token_ids": {"ids": [5] * 300}}, "INVALID_ARGUMENT"),
        ("Complete", {"model": "m", "prompt": "x", "logprobs": 10**6}, "INVALID_ARGUMENT"),
        ("StreamChat", {**CHAT, "sampling": {"n": 10**6}}, "INVALID_ARGUMENT"),
        ("Chat", {**CHAT, "sampling": {"temperature": -1}}, "INVALID_ARGUMENT"),
        ("Chat", {**CHAT, "sampling": {"temperature": float("nan")}}, "INVALID_ARGUMENT"),
        ("Chat", {**CHAT, "sampling": {"logit_bias": {5: float("inf")}}}, "INVALID_ARGUMENT"),
        ("Chat", {**CHAT, "response_format": {"json_schema": "{"}}, "INVALID_ARGUMENT"),
        ("Chat", {**CHAT, "tools": [{"name": "f", "parameters": "{"}]}, "INVALID_ARGUMENT"),
        ("Chat", {**CHAT, "tools": [DEEP], "tool_choice": "required"}, "INVALID_ARGUMENT"),
        ("Chat", {"model": "m"}, "INVALID_ARGUMENT"),
        ("Detokenize", {"model": "m", "tokens": [-1]}, "INVALID_ARGUMENT"),
    ],
)  # fmt: skip
def test_wrong_requests_have_their_code(client, server, method, fields, code):
    def call():
        answer = client(method, **fields)
        return list(answer) if method.startswith("Stream") else answer

    error = refused(call)
    assert error.code().name == code, error.details()
    assert "Traceback" not in error.details()
    assert server.complete()[0] == 200


def test_messages_have_a_limit(server):  # R121
    with running(grpc_port=0, max_body_bytes=10_000) as small:
        client = Client(small)
        error = refused(lambda: client("Complete", model="m", prompt="x" * 20_000))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        client.channel.close()


def test_every_call_but_health_needs_a_key():  # R119
    with running(grpc_port=0, tenants=(Tenant("a", Secret(KEY)),), wait_ready=False) as server:
        for key in (None, "wrong-key-entirely"):
            client = Client(server, key=key)
            for method in service().methods:
                fields = {} if method.name == "ListModels" else {"model": "m"}

                def call(method=method, fields=fields, client=client):
                    answer = client(method.name, **fields)
                    return list(answer) if method.server_streaming else answer

                assert refused(call).code() == grpc.StatusCode.UNAUTHENTICATED
            stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
            asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
            error = refused(stub.ServerReflectionInfo(iter(asked)))
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED
            health = health_pb2_grpc.HealthStub(client.channel)
            assert health.Check(health_pb2.HealthCheckRequest()).status in (1, 2)
            client.channel.close()
        until(lambda: server.engine.state == "ready")
        client = Client(server, key=KEY)
        assert client("Complete", model="m", prompt="x").choices[0].text == "Hello there"
        assert server.engine.seen[-1].tenant == "a"
        client.channel.close()


def test_two_keys_are_refused_as_by_rest():
    with running(grpc_port=0, tenants=(Tenant("a", Secret(KEY)),)) as server:
        client = Client(server, key=KEY)
        client.metadata *= 2
        error = refused(lambda: client("Complete", model="m", prompt="x"))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "more than one authorization" in error.details()
        client.channel.close()


def test_reflection_names_the_service(client):
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, described = stub.ServerReflectionInfo(iter(asked))
    names = [each.name for each in listed.list_services_response.service]
    assert {SERVICE, "grpc.health.v1.Health"} <= set(names)
    [raw] = described.file_descriptor_response.file_descriptor_proto
    assert descriptor_pb2.FileDescriptorProto.FromString(raw).name == "inference.proto"


def test_health_follows_readiness():
    with running(grpc_port=0, wait_ready=False, engine_options={"start_seconds": 0.5}) as server:
        client = Client(server)
        health = health_pb2_grpc.HealthStub(client.channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        assert health.Check(request, wait_for_ready=True).status == 2
        error = refused(lambda: client("Complete", model="m", prompt="x"))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        until(lambda: health.Check(request).status == 1)
        client.channel.close()


def test_a_call_that_is_cancelled_frees_its_place():  # R97
    with running(grpc_port=0, engine_options=slow(0.01)) as server:
        client = Client(server)
        stream = client("StreamComplete", model="m", prompt="x", sampling={"max_tokens": 4000})
        next(stream)
        stream.cancel()
        until(lambda: server.engine.is_idle, seconds=2)
        assert server.engine.aborts == 1
        # A deadline cancels too.
        begin = time.monotonic()
        error = refused(
            lambda: client(
                "Complete", timeout=0.3, model="m", prompt="x", sampling={"max_tokens": 4000}
            )
        )
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: server.engine.is_idle, seconds=2)
        assert time.monotonic() - begin < 3
        client.channel.close()


def test_a_full_queue_is_resource_exhausted():  # R101
    with running(grpc_port=0, engine_options=slow(0.01, slots=1, queue_limit=1)) as server:
        client = Client(server)
        running_calls = [
            client("StreamComplete", model="m", prompt="x", sampling={"max_tokens": 4000})
            for _ in range(6)
        ]
        until(lambda: len(server.engine.seen) >= 2)
        error = refused(lambda: client("Complete", model="m", prompt="x"))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["retry-after"] == "3"
        for call in running_calls:
            call.cancel()
        until(lambda: server.engine.is_idle)
        client.channel.close()


def test_a_call_too_many_is_told_when_to_come_again():
    with running(grpc_port=0, max_connections=2, engine_options=slow(0.01)) as server:
        client = Client(server)
        calls = [
            client("StreamComplete", model="m", prompt="x", sampling={"max_tokens": 4000})
            for _ in range(2)
        ]
        for call in calls:
            next(call)
        for name in ("Complete", "StreamComplete"):
            error = refused(lambda name=name: list(client(name, model="m", prompt="x")))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "2 calls run, as many as may" in error.details()
            assert dict(error.trailing_metadata())["retry-after"] == "1"
        # Who asks for health is no client.
        health = health_pb2_grpc.HealthStub(client.channel)
        asked = health_pb2.HealthCheckRequest(service=SERVICE)
        until(lambda: health.Check(asked).status == 1)
        for call in calls:
            call.cancel()
        until(lambda: server.engine.is_idle)
        assert client("Complete", model="m", prompt="x", sampling={"max_tokens": 1}).choices
        client.channel.close()


def test_long_messages_are_read_in_threads_of_their_own(client, monkeypatch):
    threads = []

    def validated(kind, values):
        threads.append(threading.current_thread().name)
        return validation.validated(kind, values)

    monkeypatch.setattr(rpc, "validated", validated)
    client("Complete", model="m", prompt="x")
    error = refused(lambda: client("Complete", model="m", prompt_token_ids={"ids": [5] * 70_000}))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [name.startswith("texts") for name in threads] == [False, True]
