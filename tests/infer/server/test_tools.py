"""Tool calls: what the template sees, what is forced, what comes back in OpenAI's form."""

import json
import sys

import openai
import pytest

from infer.engine.structure import Grammars
from infer.server.conversation import Tool
from infer.server.loaded import Built
from infer.server.tools import ToolParser, parse_calls
from tests.infer.server.running import MESSAGES, byte_tokenizer, events_of, running
from tests.infer.server.scripted_engine import ScriptedEngine

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}{% endfor %}"
)
CALL = '{"name": "weather", "arguments": {"place": "Bern"}}'


class Says:
    text = ""

    def __call__(self, source):
        def script(request, index):
            return byte_tokenizer().encode_plain(self.text)

        engine = ScriptedEngine(byte_tokenizer(), script, max_context=4096)
        return Built(engine, byte_tokenizer())


@pytest.fixture(scope="module")
def says():
    return Says()


@pytest.fixture(scope="module")
def server(says):
    with running(says) as running_server:
        yield running_server


def chat(server, says, text, **fields):
    says.text = text
    fields = {"tools": TOOLS, "chat_template": TEMPLATE, **fields}
    status, body, _ = server.chat(**fields)
    assert status == 200, body
    choice = body["choices"][0]
    *chunks, _ = events_of(server, "/v1/chat/completions", {"messages": MESSAGES, **fields})
    deltas = [chunk["choices"][0] for chunk in chunks]
    streamed = "".join(each["delta"].get("content") or "" for each in deltas)
    assert streamed == (choice["message"]["content"] or "")
    assert deltas[-1]["finish_reason"] == choice["finish_reason"]
    calls = [call for each in deltas for call in each["delta"].get("tool_calls", ())]
    whole = choice["message"].get("tool_calls", [])
    assert [call["function"] for call in calls] == [call["function"] for call in whole]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    return choice


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"  {CALL}\n",
        CALL.replace("arguments", "parameters"),
        f"<|python_tag|>{CALL}",
        f"[TOOL_CALLS] [{CALL}]",
        f"[{CALL}]",
        f"<tool_call>\n{CALL}\n</tool_call>",
        f'{{"type": "function", "function": {CALL}}}',
    ],
)
def test_known_forms_of_a_call(server, says, text):
    choice = chat(server, says, text)
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"place": "Bern"}


@pytest.mark.parametrize(
    "text",
    [f"{CALL};{CALL}", f"{CALL}\n{CALL}", f"[{CALL}, {CALL}]",
     f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"],
)  # fmt: skip
def test_several_calls(server, says, text):
    choice = chat(server, says, text)
    assert len(choice["message"]["tool_calls"]) == 2
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2


def test_calls_that_may_not_be_parallel_are_one(server, says):
    for text in (f"{CALL};{CALL.replace('Bern', 'Basel')}", CALL):
        choice = chat(server, says, text, parallel_tool_calls=False)
        [call] = choice["message"]["tool_calls"]
        assert "Bern" in call["function"]["arguments"]
        assert choice["message"]["content"] is None


@pytest.mark.parametrize("mark", ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"])
def test_marks_inside_arguments_stay(server, says, mark):
    call = CALL.replace("Bern", f"the mark {mark} opens")
    for text in (call, f"<tool_call>{call}</tool_call>"):
        [made] = chat(server, says, text)["message"]["tool_calls"]
        assert json.loads(made["function"]["arguments"]) == {"place": f"the mark {mark} opens"}


def test_text_before_a_call_is_content(server, says):
    choice = chat(server, says, f"Let me see. <tool_call>{CALL}</tool_call>")
    assert choice["message"]["content"] == "Let me see. "
    assert len(choice["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Plain words",
        "",
        "a < b and <tool",
        '{"name": "unknown", "arguments": {}}',
        '{"name": "weather", "argum',
        "[1, 2]",
        "{not json}",
        '"text"',
        f"{CALL} and then some",
        "<tool_call>{broken}</tool_call>",
        '{"name": {"first": "Ada"}, "age": 3}',
        '{"name": ["weather"]}',
        '{"name": null}',
        '{"name": "weather", "arguments": {"place": NaN}}',
        '{"name": "weather", "arguments": {"place": -Infinity}}',
        '{"name": "weather", "arguments": {"place": 1e999}}',
        '{"name": "weather", "arguments": {"place": "\\ud800"}}',
        '{"name": "weather", "arguments": "{\\"place\\": NaN}"}',
    ],
)
def test_what_is_no_call_comes_out_as_it_is(server, says, text):
    choice = chat(server, says, text)
    assert choice["message"]["content"] == text
    assert "tool_calls" not in choice["message"] and choice["finish_reason"] == "stop"


def test_text_that_is_no_call_is_not_held_back(server, says):
    says.text = "Plain words"
    fields = {"messages": MESSAGES, "tools": TOOLS, "chat_template": TEMPLATE}
    chunks = events_of(server, "/v1/chat/completions", fields)[:-1]
    assert len(chunks) == 2 + len(says.text)  # role, a chunk a byte, the reason


@pytest.mark.parametrize("cut", range(1, 12))
def test_the_parser_does_not_depend_on_how_text_is_cut(cut):
    text = f"Let me see < this. <tool_call>{CALL}</tool_call>"
    parser = ToolParser([Tool(**WEATHER)])
    shown = "".join(parser.push(text[begin : begin + cut]) for begin in range(0, len(text), cut))
    rest, calls, reason = parser.finish("stop")
    assert (shown + rest, len(calls), reason) == ("Let me see < this. ", 1, "tool_calls")


@pytest.mark.parametrize("is_list", [True, False])
def test_a_forced_call_that_is_cut_off_keeps_what_there_is_of_it(is_list):
    whole = f"[{CALL}, {CALL}]" if is_list else CALL
    arguments = '{"place": "Bern"}'
    for end in range(1, len(whole)):
        text = whole[:end]
        parser = ToolParser([Tool(**WEATHER)], must_call=True)
        shown = parser.push(text)
        rest, calls, reason = parser.finish("length")
        begun = text.count('"arguments":')
        if not begun:
            assert (shown + rest, calls, reason) == (text, [], "length")
            continue
        assert (shown, rest, len(calls), reason) == ("", "", begun, "length")
        *before, last = [call["function"] for call in calls]
        assert all(call == {"name": "weather", "arguments": arguments} for call in before)
        assert last["name"] == "weather"
        assert last["arguments"] == text.rpartition('"arguments":')[2].lstrip()[: len(arguments)]


def test_a_forced_call_that_max_tokens_cuts_is_a_call_of_that_length(server, says):
    begun = '{"name": "weather", "arguments": {"place'
    fields = {"max_tokens": len(begun), "tool_choice": "required", "parallel_tool_calls": False}
    choice = chat(server, says, CALL, **fields)
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"place'}
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", None)
    # One that nobody asked for may be anything.
    choice = chat(server, says, CALL, max_tokens=len(begun))
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", begun)


def test_calls_nested_without_end_are_no_calls():
    assert parse_calls("[" * 100_000, {"weather"}) == []


def test_calls_nested_too_deep_to_write_are_no_calls():
    for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()):
        parse_calls(f'{{"name": "weather", "arguments": {"[" * depth}{"]" * depth}}}', {"weather"})


def test_without_tools_json_is_text(server, says):
    says.text = CALL
    body = server.chat()[1]
    assert body["choices"][0]["message"]["content"] == CALL
    body = server.chat(tools=TOOLS, tool_choice="none")[1]
    assert body["choices"][0]["message"]["content"] == CALL


def test_the_template_sees_tools_calls_and_results(server, says):
    says.text = "ok"
    messages = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"place": "Bern"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert server.chat(messages=messages, tools=TOOLS, chat_template=TEMPLATE)[0] == 200
    ids = server.engine.seen[-1].prompt_token_ids
    prompt = byte_tokenizer().decode(ids, skip_special_tokens=False)
    assert '"description": "Of a place"' in prompt
    assert 'weather({"place": "Bern"})' in prompt  # a value, not a text of a text
    assert "<tool>rain" in prompt


def test_a_call_can_be_forced(server, says):
    says.text = CALL
    for choice, names in (
        ("required", ["weather", "time"]),
        ({"type": "function", "function": {"name": "weather"}}, ["weather"]),
    ):
        fields = {"tools": TOOLS, "chat_template": TEMPLATE, "tool_choice": choice}
        assert server.chat(**fields)[1]["choices"][0]["finish_reason"] == "tool_calls"
        structure = server.engine.seen[-1].structure
        assert structure.kind == "json_schema"
        schema = json.loads(structure.source)
        one = schema.get("items", schema)
        options = one.get("anyOf", [one])
        assert [each["properties"]["name"]["const"] for each in options] == names
        assert options[0]["properties"]["arguments"] == WEATHER["function"]["parameters"]


def test_a_function_declared_without_parameters_is_called_with_none(server, says):
    says.text = '[{"name": "time", "arguments": {}}]'
    for parameters in ({}, {"parameters": None}, {"parameters": {}}):
        tool = {"type": "function", "function": {"name": "time", **parameters}}
        choice = chat(server, says, says.text, tools=[tool], tool_choice="required")
        assert choice["finish_reason"] == "tool_calls"
        schema = json.loads(server.engine.seen[-1].structure.source)
        arguments = schema["items"]["anyOf"][0]["properties"]["arguments"]
        assert arguments == {"type": "object", "properties": {}, "additionalProperties": False}


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_of_allowed_tools_alone_the_model_hears_and_may_call_one(server, says):
    choice = chat(server, says, CALL, tool_choice=allowed("auto", "weather"))
    assert choice["finish_reason"] == "tool_calls"
    request = server.engine.seen[-1]
    prompt = byte_tokenizer().decode(request.prompt_token_ids, skip_special_tokens=False)
    assert '"weather"' in prompt and '"time"' not in prompt and request.structure is None
    choice = chat(server, says, CALL, tool_choice=allowed("auto", "time"))
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", CALL)
    chat(server, says, CALL, tool_choice=allowed("required", "weather"))
    schema = json.loads(server.engine.seen[-1].structure.source)
    [one] = schema["items"]["anyOf"]
    assert one["properties"]["name"] == {"const": "weather"}


class Compiling(ScriptedEngine):
    """Reads structures as the engine does."""

    def submit(self, request, on_event):
        ends = self.end_tokens
        if request.structure is not None:
            Grammars(self.tokenizer, vocab_size=259, end_tokens=ends).compile(request.structure)
        super().submit(request, on_event)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format"),
        ({"response_format": {"type": "grammar", "grammar": "start: x"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"type": "x"}}}},
            "response_format",
        ),
        (
            {"tool_choice": "required", "tools": [{"type": "function", "function": {
                "name": "x", "parameters": {"properties": {"a": {"type": "x"}}}}}]},
            "tools",
        ),
    ],
)  # fmt: skip
def test_a_structure_that_is_none_names_its_field(fields, param):
    pytest.importorskip("llguidance")
    tokenizer = byte_tokenizer()
    with running(lambda source: Built(Compiling(tokenizer, lambda *_: [65]), tokenizer)) as server:
        status, body, _ = server.chat(chat_template=TEMPLATE, **fields)
    assert (status, body["error"]["param"]) == (400, param), body
    assert "the structure" in body["error"]["message"]


PLACE = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
# As Pydantic makes them, with data that look like a reference.
TREE = {
    "$defs": {"Place": PLACE},
    "type": "object",
    "properties": {
        "place": {"$ref": "#/$defs/Place"},
        "default": {"items": {"$ref": "#/$defs/Place"}, "type": "array"},
        "inner": {"anyOf": [{"$ref": "#"}, {"type": "null"}], "default": {"$ref": "#"}},
        "kind": {"const": {"$ref": "#/x"}},
        "own": {"$id": "http://x/y", "items": {"$ref": "#/$defs/A"}, "$defs": {"A": PLACE}},
    },
}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"tool_choice": "required"}, "/items/anyOf/1"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "/anyOf/1"),
        ({"tool_choice": {"type": "function", "function": {"name": "tree"}}}, "/anyOf/0"),
    ],
)
def test_references_in_a_forced_schema_point_to_what_they_did(server, says, fields, place):
    llguidance = pytest.importorskip("llguidance")
    says.text = "ok"
    tree = {"type": "function", "function": {"name": "tree", "parameters": TREE}}
    fields = {"tools": [WEATHER, tree], "chat_template": TEMPLATE, **fields}
    assert server.chat(**fields)[0] == 200
    source = server.engine.seen[-1].structure.source
    schema = json.loads(source)
    for key in place.split("/")[1:]:
        schema = schema[int(key) if key.isdigit() else key]
    moved = schema["properties"]["arguments"]
    root = f"#{place}/properties/arguments"
    assert moved["$defs"] == TREE["$defs"]
    fields, given = moved["properties"], TREE["properties"]
    assert fields["place"] == fields["default"]["items"] == {"$ref": f"{root}/$defs/Place"}
    assert fields["inner"] == {**given["inner"], "anyOf": [{"$ref": root}, {"type": "null"}]}
    assert (fields["kind"], fields["own"]) == (given["kind"], given["own"])
    matcher = llguidance.LLMatcher
    assert not matcher.validate_grammar(matcher.grammar_from_json_schema(source))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS}, "tools"),  # the model's own template knows none
        ({"tools": TOOLS * 65}, "tools"),
        ({"tools": [WEATHER, WEATHER], "chat_template": TEMPLATE}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "weather", "x")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("none", "time")}, "tool_choice"),
        ({"tool_choice": allowed("required", "time")}, "tool_choice"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "string"}},
                    }
                ]
            },
            "tools.0.function",
        ),
        (
            {
                "tools": TOOLS,
                "chat_template": TEMPLATE,
                "response_format": {"type": "json_object"},
            },
            "response_format",
        ),
    ],
)
def test_what_cannot_be_is_refused(server, fields, param):
    status, body, _ = server.chat(**fields)
    assert (status, body["error"]["param"]) == (400, param), body


def test_the_openai_client_reads_calls(server, says):
    says.text = CALL
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        answer = client.chat.completions.create(
            model="m", messages=MESSAGES, tools=TOOLS, extra_body={"chat_template": TEMPLATE}
        )
        [call] = answer.choices[0].message.tool_calls
        assert (call.function.name, call.type) == ("weather", "function")
