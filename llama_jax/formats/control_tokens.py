"""Encoding in which control tokens fire only where the caller says so.

A tokenizer matches control tokens such as <|eot_id|> anywhere in its input, so text from a user
could end the user's turn. `AliasedEncoder` is a second tokenizer whose control tokens answer to
unguessable names instead of their own. Text from users is then ordinary text everywhere, the
places where a template wrote a control token get the token's secret name, and because the whole
string is still encoded in one go, prefix rules, merges and pre-tokenization are those of the
original tokenizer.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from llama_jax.formats.long_texts import encode_text


def find_control_tokens(text: str, names: Iterable[str]) -> list[tuple[int, int, str]]:
    """Where the tokenizer would match a control token: (start, end, name), leftmost longest."""
    longest_first = sorted(names, key=len, reverse=True)
    if not longest_first:
        return []
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return [(match.start(), match.end(), match[0]) for match in pattern.finditer(text)]


class AliasedEncoder:
    """A copy of `backend` whose `control` tokens (name to id) are renamed."""

    def __init__(self, backend: tokenizers.Tokenizer, control: Mapping[str, int]):
        self._control = dict(control)
        self._nonce = secrets.token_hex(16)
        # Private-use characters survive every Unicode normal form, hexadecimal every case rule.
        self._alias = {
            name: f"\ue000{self._nonce}x{index}\ue001" for name, index in control.items()
        }
        self._backend, unknown = _rename(backend, self._alias)
        # The unknown token also stands for text the vocabulary cannot spell.
        self._steering = {index for index in control.values() if index != unknown}
        for name, index in control.items():
            if self._backend.token_to_id(self._alias[name]) != index:
                raise ValueError(
                    f"tokenizer: cannot tell control token {name!r} (id {index}) from text, "
                    f"because its id depends on its name"
                )

    def encode(
        self, text: str, active: Sequence[tuple[int, int, str]] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the range of `text` each came from.

        `active` are the places (start, end, name) where a control token is meant; everywhere
        else its name is ordinary text.
        """
        if self._nonce in text:
            raise ValueError("text contains the private name of a control token")
        parts: list[str] = []
        # For every character of the aliased text, where it came from.
        origin: list[tuple[int, int]] = []
        position = 0
        for start, end, name in active:
            parts += [text[position:start], self._alias[name]]
            origin += [(at, at + 1) for at in range(position, start)]
            origin += [(start, end)] * len(self._alias[name])
            position = end
        parts.append(text[position:])
        origin += [(at, at + 1) for at in range(position, len(text))]
        encoding = encode_text(self._backend, "".join(parts))
        self._check(encoding.ids, active)
        ranges = [_range(origin, start, end, len(text)) for start, end in encoding.offsets]
        return list(encoding.ids), ranges

    def _check(self, ids: Iterable[int], active: Sequence[tuple[int, int, str]]) -> None:
        """The promise itself, looked at after the fact: no control id that nobody asked for."""
        got = [index for index in ids if index in self._steering]
        meant = [self._control[name] for _, _, name in active]
        meant = [index for index in meant if index in self._steering]
        if got != meant:
            raise ValueError(
                f"tokenizer: cannot encode control tokens as text: expected the control ids "
                f"{meant}, got {got}"
            )


def _range(origin: list[tuple[int, int]], start: int, end: int, length: int) -> tuple[int, int]:
    first = origin[start][0] if start < len(origin) else length
    return first, max(first, origin[end - 1][1] if end > start else first)


def _rename(
    backend: tokenizers.Tokenizer, alias: Mapping[str, str]
) -> tuple[tokenizers.Tokenizer, int | None]:
    """The renamed copy, and the id of its unknown token."""
    description: dict[str, Any] = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["content"] = alias.get(token["content"], token["content"])
    model = description["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {alias.get(name, name): index for name, index in vocab.items()}
    else:  # Unigram: pairs of piece and score
        model["vocab"] = [[alias.get(name, name), score] for name, score in vocab]
    unknown = model.get("unk_id")
    if isinstance(model.get("unk_token"), str):
        unknown = backend.token_to_id(model["unk_token"])
        model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, alias)]
    description["post_processor"] = None  # it names control tokens, and is not used here
    return tokenizers.Tokenizer.from_str(json.dumps(description)), unknown


def _touches(merge: str | list[str], alias: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in alias or right in alias or left + right in alias
