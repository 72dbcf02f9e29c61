"""Encoding that does not stop all other threads while a long text is on its way.

The tokenizers library holds Python's lock while it encodes one text (a megabyte takes seconds), and
gives it up for a batch, be it of one.
"""

import tokenizers

# Shorter ones take a few hundredths of a second.
LONG_CHARACTERS = 16_384


def encode_text(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """The text as the library encodes it, without special tokens."""
    if len(text) < LONG_CHARACTERS:
        return backend.encode(text, add_special_tokens=False)
    return backend.encode_batch([text], add_special_tokens=False)[0]


def text_ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids alone, which take a fraction of the time and memory: nobody asks where they are."""
    if len(text) < LONG_CHARACTERS:
        return list(backend.encode(text, add_special_tokens=False).ids)
    return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
