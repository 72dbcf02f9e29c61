"""Tokenizers written into GGUF files, read back by us and by transformers."""

import dataclasses
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llama_jax.formats.byte_level import LLAMA3_SPLIT, TEKKEN_SPLIT
from llama_jax.formats.gguf import load_gguf, save_gguf
from llama_jax.formats.gguf_reader import GGUFFile
from llama_jax.formats.tokenizer import load_tokenizer
from tests.tiny import tiny_config, tiny_params

TEXT = [
    "Hello world, it's 12345 o'clock and don't STOP.",
    "Naïve café — 漢字 한국어 🤖 x=3.14; if(a<b){return 0;}",
    "The quick brown fox jumps over the lazy dog. The dog sleeps.\n\n  Indented\ttext  ",
    "the the the hello hello world world 1 22 333 4444",
]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"


def byte_level_folder(folder, split: str | None, *, is_whole_first: bool, digits: bool = False):
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=is_whole_first))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|eos|>", "<|user|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "add_bos_token": True,
        "chat_template": [
            {"name": "default", "template": TEMPLATE},
            {"name": "rag", "template": "rag"},
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


CUTS = {
    "gpt-2": (None, False, False),
    "smollm": (None, False, True),
    "llama-bpe": (LLAMA3_SPLIT, True, False),
    "tekken": (TEKKEN_SPLIT, True, False),
}


def save(folder, tokenizer, *, vocab_size=512, **changes):
    folder.mkdir(exist_ok=True)
    config = tiny_config(vocab_size=vocab_size, bos_token_id=None, eos_token_id=(), **changes)
    path = folder / "model.gguf"
    save_gguf(path, config, tiny_params(config), tokenizer, overwrite=True)
    return config, path


@pytest.mark.parametrize("cut", CUTS)
def test_a_byte_level_tokenizer_keeps_its_ids(cut, tmp_path):
    split, is_whole_first, digits = CUTS[cut]
    tokenizer = byte_level_folder(
        tmp_path / "source", split, is_whole_first=is_whole_first, digits=digits
    )
    config, path = save(tmp_path / "out", tokenizer)
    assert GGUFFile(path).metadata["tokenizer.ggml.pre"] == cut
    again_config, _, again = load_gguf(path)
    assert again_config == config
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*TEXT, "<|user|>hi<|eos|>", "<tool> x"]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert theirs(text).input_ids == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    assert again.bos_token_id == tokenizer.bos_token_id
    assert again.eos_token_ids == tokenizer.eos_token_ids
    assert again.adds_bos and not again.adds_eos
    assert again.chat_templates == tokenizer.chat_templates
    assert theirs.chat_template == TEMPLATE
    # Rows of the embedding without a token stay without one.
    assert again.vocab_size == tokenizer.vocab_size < 512
    assert len(GGUFFile(path).metadata["tokenizer.ggml.tokens"]) == 512
    # Written once more, the file is the same.
    _, second = save(tmp_path / "second", again)
    assert second.read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return load_tokenizer(folder)


def test_a_sentencepiece_tokenizer_keeps_its_ids(sentencepiece_tokenizer, tmp_path):
    tokenizer = sentencepiece_tokenizer
    config, path = save(tmp_path / "out", tokenizer)
    metadata = GGUFFile(path).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:3].tolist() == [2, 3, 3]
    assert np.count_nonzero(types == 6) == 256
    assert types[tokenizer.token_to_id("<tool>")] == 4
    assert np.count_nonzero(types == 4) == 1
    again_config, _, again = load_gguf(path)
    assert again_config == config
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*TEXT, "the<tool>the <tool>"]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert theirs(text).input_ids == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    assert again.adds_bos
    _, second = save(tmp_path / "second", again)
    assert second.read_bytes() == path.read_bytes()


def test_named_tokens_are_the_tokenizers_own_whatever_the_config_names(
    sentencepiece_tokenizer, tmp_path
):
    config = tiny_config(vocab_size=512, bos_token_id=4, eos_token_id=(7, 2, 9, 11), pad_token_id=5)
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), sentencepiece_tokenizer)
    metadata = GGUFFile(path).metadata
    names = ("bos", "eos", "eot", "eom", "unknown")
    assert [metadata[f"tokenizer.ggml.{n}_token_id"] for n in names] == [1, 2, 7, 9, 0]
    again_config, _, again = load_gguf(path)
    assert again_config == config  # the fourth end token too
    assert again.special_tokens == sentencepiece_tokenizer.special_tokens
    assert again.pad_token_id == sentencepiece_tokenizer.pad_token_id == 2
    assert again.eos_token_ids == (2, 7, 9)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_an_end_token_that_only_the_config_names(tmp_path, caplog):
    tokenizer = byte_level_folder(tmp_path / "source", None, is_whole_first=False)
    (tmp_path / "source" / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path / "source")
    # 511 has a row in the embedding, but no token.
    config = tiny_config(vocab_size=512, bos_token_id=0, eos_token_id=(511, 1))
    path = save_gguf(tmp_path / "m.gguf", config, tiny_params(config), tokenizer)
    assert "names no eos_token; in the GGUF file it is '<|eos|>'" in caplog.text
    again_config, _, again = load_gguf(path)
    assert again_config == config
    assert again.special_tokens == {"eos_token": "<|eos|>"}


def test_a_named_token_without_a_key_is_refused(sentencepiece_tokenizer, tmp_path):
    named = {**sentencepiece_tokenizer.special_tokens, "image_token": "<tool>"}
    tokenizer = load_tokenizer(sentencepiece_tokenizer.folder)
    tokenizer.settings = dataclasses.replace(tokenizer.settings, named=named)
    with pytest.raises(ValueError, match="names image_token '<tool>', which GGUF cannot keep"):
        save(tmp_path, tokenizer)


def test_a_tokenizer_that_gguf_cannot_describe_is_refused(tmp_path):
    for name, split, is_whole_first in (
        ("other pattern", r"\p{L}+|\p{N}|.", True),
        ("nearly tekken", TEKKEN_SPLIT + "|x", True),
        ("merges first", LLAMA3_SPLIT, False),
        ("whole first", None, True),
    ):
        tokenizer = byte_level_folder(tmp_path / name, split, is_whole_first=is_whole_first)
        with pytest.raises(ValueError, match="cuts text in a way"):
            save(tmp_path, tokenizer)
    unigram = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    (tmp_path / "unigram").mkdir()
    unigram.save(str(tmp_path / "unigram" / "tokenizer.json"))
    with pytest.raises(ValueError, match="Unigram"):
        save(tmp_path, load_tokenizer(tmp_path / "unigram"))
    assert not (tmp_path / "model.gguf").exists()


def changed(folder, change, **config):
    """A byte-level tokenizer after `change` of its tokenizer.json."""
    byte_level_folder(folder, None, is_whole_first=False)
    description = json.loads((folder / "tokenizer.json").read_text())
    change(description)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    return load_tokenizer(folder)


def around(*names):
    """A post-processor that puts tokens before every text."""

    def change(description):
        ids = {token["content"]: token["id"] for token in description["added_tokens"]}
        before = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
        text = {"Sequence": {"id": "A", "type_id": 0}}
        description["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*before, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names
            },
        }

    return change


@pytest.mark.parametrize(
    ("names", "bos", "ids"),
    [
        (["<|bos|>", "<|user|>"], "<|bos|>", [0, 2]),
        (["<|bos|>", "<|bos|>"], "<|bos|>", [0, 0]),
        (["<|user|>"], "<|bos|>", [2]),
        (["<|bos|>"], None, [0]),
    ],
)
def test_what_else_stands_around_every_text_is_refused(names, bos, ids, tmp_path):
    tokenizer = changed(tmp_path / "s", around(*names), bos_token=bos, add_bos_token=None)
    assert tokenizer.encode("") == ids
    with pytest.raises(ValueError, match="around every text, but GGUF keeps only a bos_token"):
        save(tmp_path, tokenizer)
    tokenizer = changed(tmp_path / "t", around("<|bos|>"), add_bos_token=None)
    _, path = save(tmp_path / "out", tokenizer)
    assert load_gguf(path)[2].encode("") == [0]


def test_ids_between_others_that_have_no_token_stay_without_one_r21(tmp_path):
    def change(description):
        vocab = description["model"]["vocab"]
        last = max(vocab, key=vocab.get)
        vocab[last] += 20

    tokenizer = changed(tmp_path / "s", change)
    _, path = save(tmp_path / "out", tokenizer)
    again = load_gguf(path)[2]
    assert again.unused_ids(512) == tokenizer.unused_ids(512)
    assert len(again.unused_ids(tokenizer.vocab_size)) == 19
    assert again.encode(TEXT[0]) == tokenizer.encode(TEXT[0])


def test_rare_bytes_and_decoding_are_looked_at_too(tmp_path):
    def without_a_byte(description):
        vocab = description["model"]["vocab"]
        vocab["no byte"] = vocab.pop("Ā")
        description["model"]["unk_token"] = "<|user|>"

    with pytest.raises(ValueError, match="does not survive GGUF"):
        save(tmp_path, changed(tmp_path / "byte", without_a_byte))
    tokenizer = changed(tmp_path / "text", lambda description: description.update(decoder=None))
    with pytest.raises(ValueError, match="become another text"):
        save(tmp_path, tokenizer)


def test_half_a_character_is_named(tmp_path):
    tokenizer = changed(tmp_path / "s", lambda description: None, chat_template="a\ud800")
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template holds half a surrogate pair"):
        save(tmp_path, tokenizer)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_damaged_tokenizer_metadata_is_a_value_error_or_loads_r118(
    kind, sentencepiece_tokenizer, tmp_path
):
    tokenizer = sentencepiece_tokenizer
    if kind == "byte-level":
        tokenizer = byte_level_folder(tmp_path / "source", None, is_whole_first=False)
    _, path = save(tmp_path / "out", tokenizer)
    content = path.read_bytes()
    begin = content.index(b"tokenizer.ggml")
    end = min(tensor.start for tensor in GGUFFile(path).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(begin, end)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_gguf(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 30


def test_more_tokens_than_embedding_rows_are_refused_r21(tmp_path):
    tokenizer = byte_level_folder(tmp_path / "source", None, is_whole_first=False)
    with pytest.raises(ValueError, match="vocab_size is 128"):
        save(tmp_path, tokenizer, vocab_size=128)
