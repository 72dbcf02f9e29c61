"""The shipped byte tokenizer is what its script writes, and reads every text back."""

import json

import pytest

from llama_jax.demo import make_tokenizer
from llama_jax.formats.tokenizer import load_tokenizer


def test_the_shipped_files_are_what_the_script_writes(tmp_path, monkeypatch):
    shipped = {path.name: path.read_bytes() for path in make_tokenizer.FOLDER.iterdir()}
    monkeypatch.setattr(make_tokenizer, "FOLDER", tmp_path / "tokenizer")
    make_tokenizer.main()
    written = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    assert written == shipped


@pytest.mark.parametrize("text", ["", "plain", " two  spaces\n\ttab", "안녕 👍 é", "\x00\x7f"])
def test_a_token_is_a_byte(text):
    tokenizer = load_tokenizer(make_tokenizer.FOLDER, vocab_size=259)
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_the_vocabulary_has_every_byte_once():
    characters = make_tokenizer.byte_characters()
    assert len(set(characters)) == 256
    assert json.loads(json.dumps(make_tokenizer.tokenizer_json()))["model"]["vocab"]["A"] == 65
