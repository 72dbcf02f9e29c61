"""Structured output: the text matches, whatever the model would rather say."""

import json
import re

import pytest
import tokenizers
from tokenizers import decoders, models

from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.engine.request import Request, Structure
from infer.params import SamplingParams
from llama_jax.formats.tokenizer import Tokenizer
from llama_jax.formats.tokenizer_files import TokenizerSettings
from tests.infer.engine.client import ask
from tests.tiny import FAMILIES, tiny_params

pytest.importorskip("llguidance")

pytestmark = pytest.mark.compiled_quickly

WORDS = ["true", "false", "null", '{"', '":', "ab", "12"]


def character_tokenizer() -> Tokenizer:
    """Printable characters and a few longer tokens; 0 begins a text, 1 ends it."""
    words = ["<s>", "</s>", *WORDS, *map(chr, range(32, 127))]
    backend = tokenizers.Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<s>")
    )
    backend.decoder = decoders.Fuse()
    settings = TokenizerSettings(named={"bos_token": "<s>", "eos_token": "</s>"}, chat_templates={})
    return Tokenizer(backend, source="test", prefix_rule="none", settings=settings, adds_bos=False)


@pytest.fixture(scope="module")
def engine():
    config = FAMILIES["llama-gqa"].replace(eos_token_id=(1,), bos_token_id=0)
    model = config, tiny_params(config), character_tokenizer()
    engine = BatchingEngine(model, EngineOptions(max_slots=4, block_size=16, piece_tokens=32))
    engine.start()
    yield engine
    engine.stop(0)


def answer(engine, *structures, **wishes):
    params = SamplingParams(seed=3, max_tokens=120, **wishes)
    requests = [
        Request(f"s{n}", (5, 6, 7, 8), params, structure=structure)
        for n, structure in enumerate(structures)
    ]
    return ask(engine, *requests)


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "ok": {"type": "boolean"}},
    "required": ["kind", "ok"],
    "additionalProperties": False,
}


def test_kinds_of_structure_share_a_batch(engine):
    schema, pattern, grammar, free = answer(
        engine,
        Structure("json_schema", json.dumps(SCHEMA)),
        Structure("regex", "[a-c]{3,5}-[0-9]{2}"),
        Structure("grammar", 'start: "x" ("y" | "z") "!"'),
        None,
    )
    value = json.loads(schema.text())
    assert value["kind"] in ("cat", "dog") and isinstance(value["ok"], bool)
    assert re.fullmatch("[a-c]{3,5}-[0-9]{2}", pattern.text())
    assert grammar.text() in ("xy!", "xz!")
    for each in (schema, pattern, grammar):
        assert each.finish_reason() == "stop"
    (alone,) = answer(engine, None)
    assert alone.token_ids() == free.token_ids()


def test_any_object_and_greedy(engine):
    (found,) = answer(
        engine, Structure("json_object"), temperature=0.0, logit_bias={11: 12.0, ord("}") - 23: 8.0}
    )
    assert isinstance(json.loads(found.text()), dict)


def test_choices_are_structured_each_by_itself(engine):
    (found,) = answer(engine, Structure("regex", "[a-z]{8}"), n=3)
    texts = [found.text(index) for index in range(3)]
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts) and len(set(texts)) == 3


@pytest.mark.parametrize(
    "structure, message",
    [
        (Structure("json_schema", "{nonsense"), "not JSON"),
        (Structure("json_schema", "[1]"), "must be an object"),
        (Structure("json_schema", '{"type": "nothing"}'), "cannot be compiled"),
        (Structure("regex", "("), "cannot be compiled"),
        (Structure("grammar", "start: nothing"), "cannot be compiled"),
    ],
)
def test_a_structure_that_is_none_is_refused(engine, structure, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(Request("x", (5,), SamplingParams(), structure=structure), print)
    assert engine.state == "ready"


@pytest.mark.parametrize(
    ("structure", "wishes", "message"),
    [
        (Structure("regex", "a{1000000}"), {}, "the structure cannot be followed: lexer error"),
        (Structure("grammar", 'start: "a"~1000000'), {}, "cannot be followed: parser error"),
        (
            Structure("regex", "a+"),
            {"logit_bias": {ord("a") - 32 + 2 + len(WORDS): -100.0}},
            "logit_bias forbids what response_format asks for",
        ),
    ],
)
def test_a_structure_that_fails_on_the_way_ends_its_own_request_alone(
    engine, structure, wishes, message
):
    before = answer(engine, None)[0].token_ids()
    broken = Request("b", (5, 6), SamplingParams(n=2, **wishes), structure=structure)
    free = Request("f", (5, 6, 7, 8), SamplingParams(seed=3, max_tokens=120))
    failed, other = ask(engine, broken, free)
    assert failed.last.reason == "request" and message in failed.last.message
    assert other.token_ids() == before and engine.state == "ready"


@pytest.mark.parametrize("wishes", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_what_would_fight_with_the_structure_is_refused(engine, wishes):
    structure = Structure("regex", "a")
    with pytest.raises(ValueError, match=f"^{next(iter(wishes))} does not go"):
        engine.submit(Request("x", (5,), SamplingParams(**wishes), structure=structure), print)


def test_a_model_without_tokenizer_has_no_structure():
    config = FAMILIES["llama-gqa"]
    engine = BatchingEngine((config, tiny_params(config), None), EngineOptions(max_slots=2))
    with pytest.raises(ValueError, match="tokenizer"):
        engine._matcher(Request("x", (5,), SamplingParams(), structure=Structure("json_object")))
