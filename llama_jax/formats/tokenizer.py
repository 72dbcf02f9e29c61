"""Text to token ids and back: the one text interface of the product.

`load_tokenizer` reads a Hugging Face folder, `from_gguf_fields` the metadata of a GGUF file; both
give a `Tokenizer` whose ids are those of the reference for that kind of file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from llama_jax.formats.gguf_tokenizer import NAMED_IDS, GgufVocabulary, strings, typed
from llama_jax.formats.library_errors import as_value_error
from llama_jax.formats.sentencepiece_model import (
    PrefixRule,
    SentencePieceModel,
    build_sentencepiece,
    read_sentencepiece,
)
from llama_jax.formats.tiktoken_model import (
    NUM_LLAMA3_CONTROL_TOKENS,
    build_tiktoken,
    is_tiktoken,
    llama3_control_tokens,
    read_tiktoken,
)
from llama_jax.formats.tokenizer_class import StreamDecoder, Tokenizer, section
from llama_jax.formats.tokenizer_files import TokenizerSettings, read_settings

__all__ = ["StreamDecoder", "Tokenizer", "from_gguf_fields", "load_tokenizer"]


def load_tokenizer(folder: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Read a folder's tokenizer: tokenizer.json, else tokenizer.model (SentencePiece or tiktoken).

    `vocab_size` is the model's number of embedding rows; a tokenizer with more ids is refused.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    fast, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        tokenizer = _from_json(fast, settings)
    elif model.is_file() and is_tiktoken(model):
        tokenizer = _from_tiktoken(model, settings, vocab_size)
    elif model.is_file():
        tokenizer = _from_sentencepiece(model, settings)
    else:
        raise ValueError(
            f"{folder}: no tokenizer; expected tokenizer.json or tokenizer.model "
            f"(SentencePiece or tiktoken)"
        )
    if vocab_size is not None:
        tokenizer.check_vocab(vocab_size)
    return tokenizer


def from_gguf_fields(fields: Mapping[str, Any], *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.

    `fields` maps the file's keys (tokenizer.ggml.tokens, tokenizer.chat_template, …) to plain
    Python values.
    """
    vocabulary = GgufVocabulary(fields)
    backend, rule, adds_bos = vocabulary.build()
    ids = {name: vocabulary.token_id(key) for name, key in NAMED_IDS.items()}
    key = "tokenizer.chat_template"
    strings(fields, f"{key}s")  # the names of the others
    templates = {
        "default" if name == key else name.removeprefix(f"{key}."): typed(fields, name, str)
        for name in fields
        if name == key or name.startswith(f"{key}.")
    }
    flag = vocabulary.flag("add_bos_token")
    ends = [vocabulary.token_id(name) for name in ("eot", "eom")]
    tokenizer = Tokenizer(
        backend,
        source=f"GGUF metadata ({vocabulary.kind})",
        prefix_rule=rule,
        settings=TokenizerSettings(
            named={name: vocabulary.tokens[i] for name, i in ids.items() if i is not None},
            chat_templates={name: text for name, text in templates.items() if text is not None},
        ),
        adds_bos=adds_bos if flag is None else flag,
        adds_eos=bool(vocabulary.flag("add_eos_token")),
        end_tokens=[index for index in ends if index is not None],
        gguf_pre=vocabulary.pre if vocabulary.kind == "gpt2" else None,
    )
    if vocab_size is not None:
        tokenizer.check_vocab(vocab_size)
    return tokenizer


def _from_json(path: Path, settings: TokenizerSettings) -> Tokenizer:
    with as_value_error(f"{path}: the tokenizers library cannot read it"):
        backend = tokenizers.Tokenizer.from_file(str(path))
    return Tokenizer(
        backend,
        source="tokenizer.json",
        prefix_rule=_prefix_rule(backend),
        settings=settings,
        folder=path.parent,
    )


def _from_sentencepiece(path: Path, settings: TokenizerSettings) -> Tokenizer:
    model = read_sentencepiece(path)
    rule = _sentencepiece_rule(model, settings)
    pieces = model.pieces
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id}
    named = {name: pieces[index].text for name, index in ids.items() if index is not None}
    named["unk_token"] = pieces[model.unk_id].text
    return Tokenizer(
        build_sentencepiece(model, where=str(path), prefix_rule=rule),
        source="tokenizer.model (SentencePiece)",
        prefix_rule=rule,
        settings=_with_named(settings, named),
        folder=path.parent,
        adds_bos=True,  # as every SentencePiece Llama was trained
    )


def _sentencepiece_rule(model: SentencePieceModel, settings: TokenizerSettings) -> PrefixRule:
    if not model.has_dummy_prefix or settings.flag("add_prefix_space") is False:
        return "none"
    return "first chunk" if settings.flag("legacy") is False else "every chunk"


def _from_tiktoken(path: Path, settings: TokenizerSettings, vocab_size: int | None) -> Tokenizer:
    ranks = read_tiktoken(path)
    backend = build_tiktoken(ranks)
    named: dict[str, str] = {}
    if not settings.added:
        # Llama 3's list fills the model's table, so a smaller test model has fewer of them.
        room = NUM_LLAMA3_CONTROL_TOKENS if vocab_size is None else vocab_size - len(ranks)
        control = llama3_control_tokens(min(max(room, 0), NUM_LLAMA3_CONTROL_TOKENS))
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in control])
        wanted = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        named = {name: text for name, text in wanted.items() if text in control}
    return Tokenizer(
        backend,
        source="tokenizer.model (tiktoken)",
        prefix_rule="byte-level, no prefix, cut as Llama 3",
        settings=_with_named(settings, named),
        folder=path.parent,
        adds_bos=True,  # as Llama 3 was trained
    )


def _with_named(settings: TokenizerSettings, named: Mapping[str, str]) -> TokenizerSettings:
    return TokenizerSettings(
        named={**named, **settings.named},
        added=settings.added,
        extra=settings.extra,
        chat_templates=settings.chat_templates,
        raw=settings.raw,
    )


def _prefix_rule(backend: tokenizers.Tokenizer) -> str:
    """What tokenizer.json puts before text, in the words of the SentencePiece rules."""
    steps = f"{section(backend, 'normalizer')} {section(backend, 'pre_tokenizer')}"
    if '"type":"Prepend"' in steps or '"prepend_scheme":"always"' in steps:
        return "every chunk"
    if '"prepend_scheme":"first"' in steps:
        return "first chunk"
    if '"add_prefix_space":true' in steps:
        return "every chunk"
    return "none"
