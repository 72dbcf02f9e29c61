"""What the text must match, as a mask over the vocabulary before each token. No JAX here.

llguidance (extra `serve`) knows the grammars; it is asked for one mask a token.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from infer.engine.request import Structure
from llama_jax.formats.json_fields import parse_json

if TYPE_CHECKING:
    from llama_jax.formats.tokenizer import Tokenizer

# What llguidance puts before the name of a token that stands for no text.
_SPECIAL = b"\xff"


class StructureError(ValueError):
    """A structure that is none, or that cannot go on because it needs more than the library
    allows."""


class Grammars:
    """Compiles structures for one tokenizer."""

    def __init__(self, tokenizer: "Tokenizer", *, vocab_size: int, end_tokens: frozenset[int]):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_tokens = sorted(end_tokens)
        self._words = -(-vocab_size // 32)
        self._library: Any = None

    def compile(self, structure: Structure) -> "TextMatcher":
        """Raises StructureError for a source that is no schema, pattern or grammar."""
        if not self._end_tokens:
            raise ValueError("structure needs a model with an end token; this one has none")
        library = _import_llguidance()
        if self._library is None:
            wrapper = library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size))
            self._library = library.LLTokenizer(wrapper, eos_token=self._end_tokens)
        grammar = _grammar(library.LLMatcher, structure)
        problem = library.LLMatcher.validate_grammar(grammar, self._library)
        matcher = library.LLMatcher(self._library, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join((matcher.get_error() or problem).split())[:300]
            raise StructureError(f"the structure ({structure.kind}) cannot be compiled: {reason}")
        return TextMatcher(matcher, self._words)


class TextMatcher:
    """How far one text has come in its structure."""

    def __init__(self, matcher: Any, words: int):
        self._matcher, self._words = matcher, words

    def copy(self) -> "TextMatcher":
        return TextMatcher(self._matcher.deep_copy(), self._words)

    def mask(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: a bit for each token that may come next, the lowest first.

        Raises StructureError."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        whole = np.zeros(self._words, np.uint32)
        whole[: len(bits)] = bits[: self._words]
        return whole

    def push(self, token_id: int) -> None:
        """A token that the mask allowed has been taken. Raises StructureError."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            # The state that follows the first line is for the library's makers.
            reason = self._matcher.get_error().splitlines()[0]
            raise StructureError(f"the structure cannot be followed: {reason}; make it smaller")


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int):
        self._tokenizer = tokenizer
        control = set(tokenizer.control_tokens.values()) | set(tokenizer.eos_token_ids)
        self.special_token_ids = sorted(control)
        self.eos_token_id = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else None
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [
            _SPECIAL + (tokenizer.id_to_token(index) or "").encode()
            if index in control
            else tokenizer.token_bytes(index)
            for index in range(vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode_plain(text)


def _grammar(matcher: Any, structure: Structure) -> str:
    if structure.kind == "regex":
        return str(matcher.grammar_from_regex(structure.source))
    if structure.kind == "grammar":
        return str(matcher.grammar_from_lark(structure.source))
    source = structure.source if structure.kind == "json_schema" else '{"type": "object"}'
    try:
        schema = parse_json(source)
    except ValueError as error:
        raise StructureError(f"the structure's JSON schema is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise StructureError(f"the structure's JSON schema is {source[:80]}; it must be an object")
    return str(matcher.grammar_from_json_schema(json.dumps(schema)))


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            "structured output needs llguidance; run: pip install 'llama-jax[serve]'"
        ) from error
    return llguidance
