"""Token ids to text, at once or one id at a time, with the same result.

A token contributes bytes, not characters, so both ways run one incremental UTF-8 decoder over
the bytes: a character appears with its last byte and never half. The decoder section of
tokenizer.json is read into a `Detokenizer` once; kinds that no Llama-family tokenizer uses
(WordPiece, CTC, end-of-word suffixes) are refused.

One rule is SentencePiece's and not the `tokenizers` library's: in a run of byte tokens that is
not valid UTF-8, the valid characters stay and each bad byte becomes U+FFFD. The library spoils
the whole run, which no stream could repeat after it has shown a character.
"""

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from llama_jax.formats.byte_level import byte_alphabet

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_SUPPORTED = "ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip (of leading text) and none"


@dataclass
class Detokenizer:
    """What one token adds to the text, by the tokenizer's own decoder section.

    `pieces` turns a token string into bytes, given whether it is the first of the text;
    `strip` is leading text removed once, `strip_count` times at most; `per_byte_errors` says
    that every bad byte becomes one U+FFFD (byte fallback) instead of every bad sequence
    (byte-level, as Rust and Python replace).
    """

    pieces: Callable[[str, bool], bytes]
    strip: str = ""
    strip_count: int = 0
    per_byte_errors: bool = False

    def stream(self) -> "ByteStream":
        return ByteStream(self)

    def decode(self, tokens: Iterable[str]) -> str:
        stream = self.stream()
        return "".join(map(stream.push, tokens)) + stream.flush()


class ByteStream:
    """Text from token strings, one at a time. `flush` ends the text."""

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        # surrogateescape marks every single bad byte, which lets us count them.
        errors = "surrogateescape" if detokenizer.per_byte_errors else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._is_first = True
        self._strip_left = detokenizer.strip_count

    def push(self, token: str) -> str:
        piece = self._detokenizer.pieces(token, self._is_first)
        self._is_first = False
        return self._emit(self._decoder.decode(piece))

    def flush(self) -> str:
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._detokenizer.per_byte_errors:
            text = _ESCAPED_BYTE.sub("�", text)
        strip = self._detokenizer.strip
        while self._strip_left and text:
            if not text.startswith(strip):
                self._strip_left = 0
                break
            text = text[len(strip) :]
            self._strip_left -= 1
        return text


@dataclass
class _Steps:
    """The decoder section, read step by step."""

    replacements: list[tuple[str, str]] = field(default_factory=list)
    byte_level: bool = False
    byte_fallback: bool = False
    metaspace: tuple[str, bool] | None = None
    is_fused: bool = False
    strip: tuple[str, int] = ("", 0)
    joined_by: str = ""


def make_detokenizer(decoder: dict[str, Any] | None) -> Detokenizer:
    """Read the `decoder` section of a tokenizer.json (None: pieces are joined by spaces)."""
    steps = _Steps(joined_by="" if decoder else " ")
    for step in _flat(decoder):
        _read_step(steps, step)
    alphabet = byte_alphabet()

    def pieces(token: str, is_first: bool) -> bytes:
        for pattern, content in steps.replacements:
            token = token.replace(pattern, content)
        if steps.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if steps.metaspace:
            mark, has_prefix = steps.metaspace
            # The library drops every mark of the first piece, not only the first mark.
            token = token.replace(mark, "" if is_first and has_prefix else " ")
        if steps.byte_level and all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return (("" if is_first else steps.joined_by) + token).encode("utf-8", "replace")

    return Detokenizer(pieces, *steps.strip, per_byte_errors=steps.byte_fallback)


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flat(inner)]
    return [decoder]


def _read_step(steps: _Steps, step: dict[str, Any]) -> None:
    kind = step.get("type")
    if steps.byte_level and kind != "Fuse":
        _refuse(step, "after ByteLevel")
    if kind == "ByteLevel":
        steps.byte_level = True
        if steps.byte_fallback:
            _refuse(step, "after ByteFallback")
    elif kind == "Metaspace":
        # Files written before prepend_scheme existed carry add_prefix_space instead.
        has_prefix = step.get("prepend_scheme", "always") != "never"
        steps.metaspace = (step["replacement"], has_prefix and step.get("add_prefix_space", True))
    elif kind == "Replace" and "String" in step["pattern"] and not steps.is_fused:
        steps.replacements.append((step["pattern"]["String"], step["content"]))
    elif kind == "ByteFallback" and not steps.is_fused:
        steps.byte_fallback = True
    elif kind == "Fuse":
        steps.is_fused = True
    elif kind == "Strip" and steps.is_fused and not step["stop"]:
        steps.strip = (step["content"], step["start"])
    else:
        _refuse(step, "here")


def _refuse(step: dict[str, Any], where: str) -> None:
    raise ValueError(
        f"tokenizer.json: decoder step {step} is not supported {where}; supported are {_SUPPORTED}"
    )
