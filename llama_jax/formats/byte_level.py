"""Byte-level BPE: the alphabet of the 256 bytes, the patterns that cut text, the tokenizer."""

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

# How Llama 3 cuts text before merging: contractions, words with one leading other character,
# up to three digits, punctuation, line ends, spaces. The pattern is part of the model.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Mistral Nemo's (tekken): words by case, single digits.
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> dict[str, int]:
    """The character of byte-level BPE for each of the 256 bytes, as GPT-2 chose them.

    Printable Latin-1 characters stand for themselves; the others follow from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in sorted(printable)} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    split: str | None,
    is_whole_first: bool,
) -> tokenizers.Tokenizer:
    """Byte-level BPE, cut by the pattern `split` (None: GPT-2's own)."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=is_whole_first)
    )
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
