"""A SentencePiece vocabulary as a tokenizer of the `tokenizers` library, with the same ids.

The prefix rule. SentencePiece puts a space before the text (its dummy prefix) when the model
says so. A control token such as </s> cuts the text into chunks, and two rules are in use:

- "every chunk": each chunk is encoded as SentencePiece alone would encode it. Meta's own code,
  llama.cpp and transformers' legacy mode do this. The default.
- "first chunk": only text at the very start gets the prefix, and only if it does not begin with
  a space. transformers does this for "legacy": false in tokenizer_config.json.

A model without a dummy prefix, or "add_prefix_space": false, has rule "none".
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llama_jax.formats.library_errors import as_value_error

SPACE = "▁"
PrefixRule = Literal["every chunk", "first chunk", "none"]


class PieceType(IntEnum):
    """Numbers of SentencePiece's protocol, which GGUF took over as token_type. ABSENT is our own:
    an id without a piece, among ids that have one."""

    ABSENT = -1
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a vocabulary file says, in the names of SentencePiece's own protocol."""

    pieces: Sequence[Piece]
    kind: Literal["bpe", "unigram"]
    has_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    character_map: bytes = b""
    byte_fallback: bool = True
    unk_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model file. Raises ValueError where the ids could not be kept."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: neither a SentencePiece model nor a tiktoken file") from error
    if not proto.pieces:
        raise ValueError(f"{path}: a SentencePiece model without pieces")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    _check_ids(path, trainer, len(proto.pieces))
    kinds: dict[int, Literal["bpe", "unigram"]] = {1: "unigram", 2: "bpe"}
    if trainer.model_type not in kinds:
        raise ValueError(
            f"{path}: SentencePiece model_type {trainer.model_type}; supported are unigram and bpe"
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError(
            f"{path}: SentencePiece options treat_whitespace_as_suffix and "
            f"escape_whitespaces=false are not supported"
        )
    return SentencePieceModel(
        pieces=[Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces],
        kind=kinds[trainer.model_type],
        has_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        character_map=normalizer.precompiled_charsmap,
        byte_fallback=trainer.byte_fallback,
        unk_id=trainer.unk_id,
        bos_id=_id_or_none(trainer.bos_id),
        eos_id=_id_or_none(trainer.eos_id),
        pad_id=_id_or_none(trainer.pad_id),
    )


def _check_ids(path: Path, trainer: Any, num_pieces: int) -> None:
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        index = getattr(trainer, name)
        # Any negative number but the unknown token's says that there is no such token.
        if index >= num_pieces or (name == "unk_id" and index < 0):
            raise ValueError(f"{path}: {name} is {index}, but there are {num_pieces} pieces")


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def build_sentencepiece(
    model: SentencePieceModel, *, where: str, prefix_rule: PrefixRule
) -> tokenizers.Tokenizer:
    """Same ids as SentencePiece for text without control tokens; these become added tokens."""
    names = [piece.text for piece in model.pieces]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}: piece {twice!r} occurs twice in the vocabulary")
    for piece in model.pieces:
        if math.isnan(piece.score):
            raise ValueError(f"{where}: the score of piece {piece.text!r} is not a number")
    user_defined = [piece.text for piece in _of_type(model, PieceType.USER_DEFINED)]
    tokenizer = tokenizers.Tokenizer(
        _bpe(model, is_whole_first=bool(user_defined)) if model.kind == "bpe" else _unigram(model)
    )
    with as_value_error(f"{where}: its precompiled character map is damaged"):
        tokenizer.normalizer = _normalizer(model, prefix_rule)
    splits: list[pre_tokenizers.PreTokenizer] = []
    if prefix_rule == "first chunk":
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if model.kind == "unigram" and model.byte_fallback:
        # SentencePiece keeps byte pieces out of its search: the text "<0x41>" is six characters.
        splits.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), behavior="isolated"))
    if user_defined:
        # SentencePiece never merges these with their neighbours.
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest_first)))
        splits.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if prefix_rule != "none":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    control = _of_type(model, PieceType.CONTROL) + _of_type(model, PieceType.UNKNOWN)
    tokenizer.add_special_tokens(
        [AddedToken(piece.text, normalized=False, special=True) for piece in control]
    )
    return tokenizer


def _of_type(model: SentencePieceModel, kind: PieceType) -> list[Piece]:
    return [piece for piece in model.pieces if piece.type == kind]


def _normalizer(model: SentencePieceModel, prefix_rule: PrefixRule) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if prefix_rule == "every chunk":
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _bpe(model: SentencePieceModel, *, is_whole_first: bool) -> models.BPE:
    """SentencePiece joins the two neighbours whose join has the best score; merges say the same.

    Its tie between several ways to cut one piece goes to the leftmost place in the text; here
    the cut with the longest left part comes first, which is how a run of equal characters grows.
    """
    normal = {piece.text: piece.score for piece in _of_type(model, PieceType.NORMAL)}
    ranked = [
        (-score, -cut, text)
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    ranked.sort()
    return models.BPE(
        vocab={
            piece.text: index
            for index, piece in enumerate(model.pieces)
            if piece.type != PieceType.ABSENT
        },
        merges=[(text[:-cut], text[-cut:]) for _, cut, text in ranked],
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=is_whole_first,
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    if _of_type(model, PieceType.UNUSED):
        raise ValueError("a SentencePiece unigram model with unused pieces is not supported")
    vocab = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(vocab, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
