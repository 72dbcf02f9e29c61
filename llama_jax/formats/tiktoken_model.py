"""A tiktoken file (Llama 3's tokenizer.model) as a tokenizer of the `tokenizers` library.

The file holds one token a line, base64 and rank. It names no control tokens: Meta keeps those in
code. They come from tokenizer_config.json where there is one, else from Llama 3's list below.
"""

import base64
import binascii
import re
from pathlib import Path

import tokenizers

from llama_jax.formats.byte_level import LLAMA3_SPLIT, byte_alphabet, byte_level_bpe

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")

NUM_LLAMA3_CONTROL_TOKENS = 256
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def llama3_control_tokens(count: int = NUM_LLAMA3_CONTROL_TOKENS) -> list[str]:
    """Llama 3.1's control tokens in order; those without a use are numbered."""
    reserved = (f"<|reserved_special_token_{index}|>" for index in range(count))
    return [_NAMED.get(index) or next(reserved) for index in range(count)]


def is_tiktoken(path: Path) -> bool:
    """By content: the first line is base64, a space and a number."""
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(4096).rstrip(b"\r\n")) is not None


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Token bytes to rank. Ranks count from 0 without a gap, and every byte is a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}: line {number} is not a base64 token, a space and a rank: {line[:80]!r}"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks must be 0 to {len(ranks) - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path}: no token for the single bytes {missing[:8]}")
    return ranks


def build_tiktoken(ranks: dict[bytes, int], *, split: str = LLAMA3_SPLIT) -> tokenizers.Tokenizer:
    """Byte-level BPE with tiktoken's ids; control tokens are the caller's to add."""
    character = {byte: text for text, byte in byte_alphabet().items()}
    spelled = {token: "".join(character[byte] for byte in token) for token in ranks}
    # tiktoken joins the neighbours whose join has the lowest rank, however that join is cut.
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return byte_level_bpe(
        {spelled[token]: rank for token, rank in ranks.items()},
        merges,
        split=split,
        # A piece that is a token as a whole is that token, whether merges lead to it or not.
        is_whole_first=True,
    )
