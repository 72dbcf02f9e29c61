"""The tokenizer inside a GGUF file's metadata, as a tokenizer of the `tokenizers` library."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tokenizers import AddedToken

from llama_jax.formats.byte_level import LLAMA3_SPLIT, TEKKEN_SPLIT, byte_level_bpe
from llama_jax.formats.sentencepiece_model import (
    Piece,
    PieceType,
    PrefixRule,
    SentencePieceModel,
    build_sentencepiece,
)

logger = logging.getLogger(__name__)

_PREFIX = "tokenizer.ggml."

# Named tokens and the …_token_id keys they have here; one is misspelled in GGUF.
NAMED_IDS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
    "cls_token": "cls",
    "mask_token": "mask",
}

# tokenizer.ggml.pre: the pattern that cuts text, whether a piece that is a token as a whole is
# taken before merging, and whether BOS is added when the file does not say.
# "smollm" is read as transformers reads it, by GPT-2's pattern. llama.cpp isolates digits first;
# the ids differ where two or more whitespace characters stand before a digit.
_BYTE_LEVEL_RULES: dict[str, tuple[str | None, bool, bool]] = {
    "gpt-2": (None, False, False),
    "smollm": (None, False, False),
    "llama-bpe": (LLAMA3_SPLIT, True, True),
    "llama3": (LLAMA3_SPLIT, True, True),
    "llama-v3": (LLAMA3_SPLIT, True, True),
    "tekken": (TEKKEN_SPLIT, True, True),
}


_KINDS = {str: "a string", bool: "true or false", int: "an integer"}
Kind = TypeVar("Kind", str, bool, int)


def typed(fields: Mapping[str, Any], key: str, kind: type[Kind]) -> Kind | None:
    """A value of a GGUF file, None where it has none. Raises ValueError for another kind."""
    value = fields.get(key)
    if value is not None and type(value) is not kind:  # to Python a boolean is an integer
        raise _other_kind(key, value, _KINDS[kind])
    return value


def strings(fields: Mapping[str, Any], key: str) -> list[str] | None:
    """The same for an array of strings."""
    value = fields.get(key)
    if value is not None and not (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ):
        raise _other_kind(key, value, "an array of strings")
    return value


def _other_kind(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"GGUF: {key} is {value!r:.80}; it must be {allowed}")


class GgufVocabulary:
    """The vocabulary keys of a GGUF file, checked. `fields` maps full keys to Python values."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields
        self.kind = self._required("model", self.text("model"))
        self.tokens = self._required("tokens", strings(fields, _PREFIX + "tokens"))
        types = self._required("token_type", self._per_token("token_type", "integers", "iu"))
        # Converters and our own export fill ids that have no token in this way.
        self.types = [
            PieceType.ABSENT if (kind, token) == (PieceType.UNUSED, f"[PAD{index}]") else kind
            for index, (kind, token) in enumerate(zip(types, self.tokens, strict=True))
        ]
        # Each kind needs some of these; all are checked.
        self.pre = self.text("pre")
        self._scores = self._per_token("scores", "numbers", "iuf")
        self._merges = strings(fields, _PREFIX + "merges")
        self._has_prefix = self.flag("add_space_prefix")
        self._removes_spaces = self.flag("remove_extra_whitespaces")
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"GGUF: {_PREFIX}tokens holds the same token twice")

    def text(self, name: str) -> str | None:
        return typed(self._fields, _PREFIX + name, str)

    def flag(self, name: str) -> bool | None:
        return typed(self._fields, _PREFIX + name, bool)

    def token_id(self, name: str) -> int | None:
        """One of the …_token_id keys, checked against the table."""
        index = typed(self._fields, f"{_PREFIX}{name}_token_id", int)
        if index is not None and not 0 <= index < len(self.tokens):
            raise ValueError(
                f"GGUF: {_PREFIX}{name}_token_id is {index}, but the vocabulary has "
                f"{len(self.tokens)} tokens"
            )
        if index is not None and self.types[index] == PieceType.ABSENT:
            raise ValueError(f"GGUF: {_PREFIX}{name}_token_id is {index}, an id without a token")
        return index

    def _required(self, name: str, value: Any) -> Any:
        if value is None:
            raise ValueError(f"GGUF: {_PREFIX}{name} is missing, so the file has no tokenizer")
        return value

    def _per_token(self, name: str, items: str, kinds: str) -> list[Any] | None:
        """An array of `items`, whose dtypes are of these `kinds` of numpy's."""
        values = self._fields.get(_PREFIX + name)
        if values is None:
            return None
        if not isinstance(values, list | np.ndarray) or np.asarray(values).dtype.kind not in kinds:
            raise _other_kind(_PREFIX + name, values, f"an array of {items}")
        if len(values) != len(self.tokens):
            raise ValueError(
                f"GGUF: {_PREFIX}{name} has {len(values)} entries for {len(self.tokens)} tokens"
            )
        return np.asarray(values).tolist()

    def build(self) -> tuple[tokenizers.Tokenizer, str, bool]:
        """(tokenizer, the rule in use in words, whether BOS is added by default)."""
        if self.kind == "gpt2":
            return self._byte_level()
        if self.kind == "llama":
            return self._sentencepiece()
        raise ValueError(
            f"GGUF: {_PREFIX}model is {self.kind!r}; supported are 'gpt2' (byte-level BPE) and "
            f"'llama' (SentencePiece BPE)"
        )

    def _byte_level(self) -> tuple[tokenizers.Tokenizer, str, bool]:
        pre = self.pre
        if pre is None:
            logger.warning(
                "GGUF: %spre is missing; text is cut by GPT-2's pattern. If this is a Llama 3 "
                "model, convert it again with a current converter.",
                _PREFIX,
            )
            pre = "gpt-2"
        if pre not in _BYTE_LEVEL_RULES:
            raise ValueError(
                f"GGUF: {_PREFIX}pre is {pre!r}; supported are {sorted(_BYTE_LEVEL_RULES)}"
            )
        split, is_whole_first, adds_bos = _BYTE_LEVEL_RULES[pre]
        vocab = {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != PieceType.ABSENT
        }
        merges = []
        for number, merge in enumerate(self._required("merges", self._merges)):
            left, _, right = merge.partition(" ")
            if not (left in vocab and right in vocab and left + right in vocab):
                raise ValueError(
                    f"GGUF: {_PREFIX}merges[{number}] is {merge!r}, but the vocabulary does not "
                    f"hold both parts and their union"
                )
            merges.append((left, right))
        tokenizer = byte_level_bpe(vocab, merges, split=split, is_whole_first=is_whole_first)
        typed = list(zip(self.tokens, self.types, strict=True))
        tokenizer.add_special_tokens(
            [AddedToken(t, normalized=False) for t, kind in typed if kind == PieceType.CONTROL]
        )
        tokenizer.add_tokens(
            [AddedToken(t, normalized=False) for t, kind in typed if kind == PieceType.USER_DEFINED]
        )
        return tokenizer, f"byte-level, no prefix, cut as {pre}", adds_bos

    def _sentencepiece(self) -> tuple[tokenizers.Tokenizer, str, bool]:
        scores = self._required("scores", self._scores)
        rule: PrefixRule = "none" if self._has_prefix is False else "every chunk"
        unk = self.token_id("unknown")
        model = SentencePieceModel(
            pieces=[
                Piece(text, float(score), kind)
                for text, score, kind in zip(self.tokens, scores, self.types, strict=True)
            ],
            kind="bpe",
            has_dummy_prefix=rule != "none",
            remove_extra_whitespaces=bool(self._removes_spaces),
            byte_fallback=PieceType.BYTE in self.types,
            unk_id=unk if unk is not None else self._unknown_id(),
        )
        return build_sentencepiece(model, where="GGUF", prefix_rule=rule), rule, True

    def _unknown_id(self) -> int:
        if PieceType.UNKNOWN not in self.types:
            raise ValueError(f"GGUF: {_PREFIX}unknown_token_id is missing and no token has type 2")
        return self.types.index(PieceType.UNKNOWN)
