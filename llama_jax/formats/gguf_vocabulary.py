"""A tokenizer as the `tokenizer.*` metadata of a GGUF file; `gguf_tokenizer.py` reads them.

GGUF describes a tokenizer by its vocabulary and the name of a known way to cut text. A tokenizer
that no such name fits is refused, because a reader would give other ids without a word.
"""

import contextlib
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from gguf.constants import GGUFValueType, TokenType

from llama_jax.formats.byte_level import LLAMA3_SPLIT, TEKKEN_SPLIT
from llama_jax.formats.gguf_fields import Entry
from llama_jax.formats.gguf_tokenizer import NAMED_IDS
from llama_jax.formats.tokenizer import Tokenizer, from_gguf_fields
from llama_jax.formats.tokenizer_class import ANY_TEXT

logger = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."

# Every named way to cut text that can be written: the steps before the byte alphabet, and whether
# a piece that is a token as a whole is taken before merging.
_CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((LLAMA3_SPLIT,), True): "llama-bpe",
    ((TEKKEN_SPLIT,), True): "tekken",
}

# Read back by our own reader and compared, in addition to the vocabulary.
_PROBES = (
    "Hello world, it's 12345 o'clock.\n\n  Indented\ttext  ",
    " don't STOP Naïve café — 漢字 한국어 🤖🎉 x=3.14; if(a<b){return 0;}",
    "ПРИВЕТ мир\r\nمرحبا 1 22 333 4444 [INST] <tag>",
    ANY_TEXT,
)


def vocabulary_entries(
    tokenizer: Tokenizer, *, vocab_size: int, end_tokens: Sequence[int]
) -> list[Entry]:
    """The metadata of `tokenizer` for a model with `vocab_size` embedding rows.

    `end_tokens` are those of the model's config. Named tokens are the tokenizer's own, since chats
    are written with them; where the config names others, `llama_jax.config` keeps its ids.
    Raises ValueError for a tokenizer that GGUF cannot describe.
    """
    tokenizer.check_vocab(vocab_size)
    description = json.loads(tokenizer.backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"the tokenizer ({tokenizer.source}) is of type {model['type']}; GGUF export writes "
            f"byte-level and SentencePiece BPE"
        )
    is_byte_level = "ByteLevel" in json.dumps(description["pre_tokenizer"])
    entries = [
        _entry("model", GGUFValueType.STRING, "gpt2" if is_byte_level else "llama"),
        _entry(
            "pre",
            GGUFValueType.STRING,
            _cut(tokenizer, description) if is_byte_level else "default",
        ),
        *_tables(tokenizer, description, vocab_size, is_byte_level=is_byte_level),
        _entry("add_bos_token", GGUFValueType.BOOL, tokenizer.adds_bos),
        _entry("add_eos_token", GGUFValueType.BOOL, tokenizer.adds_eos),
        _entry(
            "add_space_prefix",
            GGUFValueType.BOOL,
            not is_byte_level and tokenizer.prefix_rule != "none",
        ),
        *_named_tokens(tokenizer, end_tokens),
        *_templates(tokenizer),
    ]
    _verify(tokenizer, entries)
    return entries


def _entry(name: str, kind: GGUFValueType, value: Any) -> Entry:
    return Entry(_PREFIX + name, kind, value)


def _array(name: str, kind: GGUFValueType, values: list[Any]) -> Entry:
    return Entry(_PREFIX + name, GGUFValueType.ARRAY, values, kind)


def _cut(tokenizer: Tokenizer, description: dict[str, Any]) -> str:
    """The `tokenizer.ggml.pre` of a byte-level tokenizer."""
    before = description["pre_tokenizer"]
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    cuts: list[str] = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cuts += ["gpt-2"] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            cuts.append("digits")
        elif (
            step["type"] == "Split"
            and step["behavior"] == "Isolated"
            and not step["invert"]
            and "Regex" in step["pattern"]
        ):
            cuts.append(step["pattern"]["Regex"])
        else:
            cuts.append(json.dumps(step, ensure_ascii=False))
    is_whole_first = bool(description["model"].get("ignore_merges"))
    name = _CUTS.get((tuple(cuts), is_whole_first))
    if name is None or description["normalizer"] is not None:
        raise ValueError(
            f"the tokenizer ({tokenizer.source}) cuts text in a way GGUF has no known name for: "
            f"normalizer {description['normalizer']}, {' then '.join(cuts) or 'no pattern'}, "
            f"ignore_merges {is_whole_first}. "
            f"Supported are {', '.join(_CUTS.values())}; export to Hugging Face's format instead"
        )
    return tokenizer.gguf_pre or name


def _tables(
    tokenizer: Tokenizer, description: dict[str, Any], vocab_size: int, *, is_byte_level: bool
) -> list[Entry]:
    """Tokens with their types, and merges or scores. Rows without a token are marked unused."""
    tokens = [tokenizer.id_to_token(index) for index in range(vocab_size)]
    added = {item["id"]: item for item in description["added_tokens"]}
    flagged = [
        a["content"] for a in added.values() if a["lstrip"] or a["rstrip"] or a["single_word"]
    ]
    if flagged:
        logger.warning(
            "GGUF cannot say that %s take in neighbouring spaces or whole words", flagged
        )
    unknown = description["model"]["unk_token"]
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        for merge in description["model"]["merges"]
    ]
    isolated = set() if is_byte_level else _isolated(description, merges)
    types = []
    for index, token in enumerate(tokens):
        if token is None:
            types.append(TokenType.UNUSED)
        elif not is_byte_level and token == unknown:
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        elif token in isolated:
            types.append(TokenType.USER_DEFINED)
        elif not is_byte_level and _is_byte(token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    names = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    tables = [
        _array("tokens", GGUFValueType.STRING, names),
        _array("token_type", GGUFValueType.INT32, [int(kind) for kind in types]),
    ]
    if is_byte_level:
        tables.append(_array("merges", GGUFValueType.STRING, [" ".join(pair) for pair in merges]))
    else:
        scores = _scores(names, types, merges)
        tables.append(_array("scores", GGUFValueType.FLOAT32, scores))
    return tables


def _isolated(description: dict[str, Any], merges: list[tuple[str, ...]]) -> set[str]:
    """SentencePiece's user-defined pieces, which `build_sentencepiece` cuts out before merging."""
    before = description["pre_tokenizer"] or {}
    patterns = []
    for step in before.get("pretokenizers", [before]):
        if step.get("type") == "Split" and "Regex" in step["pattern"]:
            with contextlib.suppress(re.error):  # others' patterns may be none of Python's
                patterns.append(re.compile(step["pattern"]["Regex"]))
    merged = {part for pair in merges for part in (*pair, "".join(pair))}
    return {
        token
        for token in description["model"]["vocab"]
        if token not in merged and any(pattern.fullmatch(token) for pattern in patterns)
    }


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(names: list[str], types: list[TokenType], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece's scores: the earlier a token is merged, the higher; characters come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    # Densely numbered, so that float32 keeps them apart however many merges there are.
    order = {rank: place for place, rank in enumerate(sorted(ranks.values()))}
    return [
        -float(order[ranks[name]] if name in ranks else len(order) + index)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
        else 0.0
        for index, (name, kind) in enumerate(zip(names, types, strict=True))
    ]


def _named_tokens(tokenizer: Tokenizer, end_tokens: Sequence[int]) -> list[Entry]:
    """Ids of the tokenizer's named tokens; other ends as the ends of a turn and of a message."""
    named = tokenizer.special_tokens
    ids = {
        key: tokenizer.token_to_id(named[name]) for name, key in NAMED_IDS.items() if name in named
    }
    ends = [
        end
        for end in end_tokens
        if end != ids.get("eos") and tokenizer.id_to_token(end) is not None
    ]
    if "eos" not in ids and ends:
        logger.warning(
            "the tokenizer names no eos_token; in the GGUF file it is %r, the model's first end "
            "token, because llama.cpp would take another one",
            tokenizer.id_to_token(ends[0]),
        )
    free = [key for key in ("eos", "eot", "eom") if key not in ids]
    ids.update(zip(free, ends, strict=False))
    return [_entry(f"{key}_token_id", GGUFValueType.UINT32, index) for key, index in ids.items()]


def _templates(tokenizer: Tokenizer) -> list[Entry]:
    entries = []
    others = [name for name in tokenizer.chat_templates if name != "default"]
    if "default" in tokenizer.chat_templates:
        text = tokenizer.chat_templates["default"]
        entries.append(Entry("tokenizer.chat_template", GGUFValueType.STRING, text))
    if others:
        key, kind = "tokenizer.chat_templates", GGUFValueType.STRING
        entries.append(Entry(key, GGUFValueType.ARRAY, others, kind))
    for name in others:
        key = f"tokenizer.chat_template.{name}"
        entries.append(Entry(key, GGUFValueType.STRING, tokenizer.chat_templates[name]))
    return entries


def _verify(tokenizer: Tokenizer, entries: list[Entry]) -> None:
    """Reads the entries back: named tokens and ids of some texts must be the tokenizer's own."""
    again = from_gguf_fields({entry.key: entry.value for entry in entries})
    for name, token in tokenizer.special_tokens.items():
        if again.special_tokens.get(name) != token:
            raise ValueError(
                f"the tokenizer ({tokenizer.source}) names {name} {token!r}, which GGUF cannot "
                f"keep; named tokens there are {', '.join(NAMED_IDS)}. Remove {name}, or export to "
                f"Hugging Face's format instead"
            )
    wanted, got = tokenizer.encode(""), again.encode("")
    if wanted != got:
        raise ValueError(
            f"the tokenizer ({tokenizer.source}) puts the ids {wanted} around every text, but GGUF "
            f"keeps only a bos_token before and an eos_token behind it, here {got}; name these two "
            f"in tokenizer_config.json, or export to Hugging Face's format instead"
        )
    for text in _PROBES:
        wanted = tokenizer.encode(text, add_special_tokens=False)
        got = again.encode(text, add_special_tokens=False)
        if wanted != got:
            raise ValueError(
                f"the tokenizer ({tokenizer.source}) does not survive GGUF: {text[:60]!r}… gives "
                f"{len(wanted)} ids, but {len(got)} others when read back from the metadata; "
                f"export to Hugging Face's format instead"
            )
        if tokenizer.decode(wanted) != again.decode(wanted):
            raise ValueError(
                f"the tokenizer ({tokenizer.source}) does not survive GGUF: read back from the "
                f"metadata, the ids of {text[:60]!r}… become another text; export to Hugging "
                f"Face's format instead"
            )
    if tokenizer.prefix_rule == "first chunk":
        logger.warning(
            "the tokenizer marks a word's start only at the beginning of a text, but readers of "
            "GGUF do so after every control token as well: ids after one can differ there"
        )
