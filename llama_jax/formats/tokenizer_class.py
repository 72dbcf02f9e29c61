"""The `Tokenizer`: ids from text, text from ids, and the numbers a model needs to know.

Rules that hold for every source:
- `encode` writes exactly one begin token where the model wants one, also when the text already
  starts with it.
- Decoding never cleans up spaces: clean_up_tokenization_spaces is a rule for other kinds of
  tokenizers and would change text.
- A tokenizer without a pad token pads with its first end token (without one: the begin token,
  then id 0). Padding is told apart by length, never by id, and the embedding is never resized.
"""

import copy
import functools
import json
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import AddedToken, models

from llama_jax.formats import save_tokenizer
from llama_jax.formats.control_tokens import AliasedEncoder, find_control_tokens
from llama_jax.formats.detokenize import make_detokenizer
from llama_jax.formats.json_fields import check_characters
from llama_jax.formats.library_errors import as_value_error
from llama_jax.formats.long_texts import text_ids
from llama_jax.formats.tokenizer_files import TokenizerSettings

# Every byte of UTF-8, and characters that few vocabularies have.
ANY_TEXT = "".join(
    map(chr, (*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000)))
)


class Tokenizer:
    """Text to ids and back.

    `source` names the kind of file the ids come from, `prefix_rule` says in words what is put
    before text. `folder` is where the source files lie, None when there are none to copy;
    `gguf_pre` is the name a GGUF file gave to the way it cuts text.
    `settings.named` holds the special tokens by their Hugging Face names. `today` is the day that
    chat templates are told, None for the present.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        source: str,
        prefix_rule: str,
        settings: TokenizerSettings,
        folder: Path | None = None,
        adds_bos: bool | None = None,
        adds_eos: bool | None = None,
        end_tokens: Iterable[int] = (),
        gguf_pre: str | None = None,
    ):
        # Files may carry the truncation, padding and dropout of a training run.
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        self._backend = backend
        self.source = source
        self.prefix_rule = prefix_rule
        self.settings = settings
        self.folder = folder
        self.gguf_pre = gguf_pre
        self.today: date | None = None
        _add_tokens(backend, settings)
        self._table: dict[int, str] = {
            index: token for token, index in backend.get_vocab(with_added_tokens=True).items()
        }
        self._special = {
            token.content for token in backend.get_added_tokens_decoder().values() if token.special
        }
        self.bos_token_id = self._named_id("bos_token")
        eos = self._named_id("eos_token")
        ends = [*([] if eos is None else [eos]), *end_tokens]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        pad = self._named_id("pad_token")
        begins = [] if self.bos_token_id is None else [self.bos_token_id]
        self.pad_token_id: int = pad if pad is not None else [*self.eos_token_ids, *begins, 0][0]
        self._before, self._after = self._added_by_encode(adds_bos, adds_eos)
        self._detokenizer = make_detokenizer(json.loads(section(backend, "decoder")))

    # Numbers and checks

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer of the `tokenizers` library. Shared, so never change its settings."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """The highest id with a token, plus one."""
        return max(self._table) + 1

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Template texts by name; the usual one is called default."""
        return self.settings.chat_templates

    @property
    def tells_the_day(self) -> bool:
        """Whether a chat template asks what day it is, as that of Llama 3.2 does."""
        return any("strftime_now" in text for text in self.chat_templates.values())

    def on(self, today: date) -> Self:
        """The same tokenizer, whose chat templates take `today` for the present."""
        other = copy.copy(self)
        other.today = today
        return other

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token, eos_token, …: the text of each named token, for chat templates."""
        return self.settings.named

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts a begin token first."""
        return self.bos_token_id is not None and self.bos_token_id in self._before

    @property
    def adds_eos(self) -> bool:
        """Whether `encode` puts an end token last."""
        return bool(set(self._after) & set(self.eos_token_ids))

    def check_vocab(self, model_vocab_size: int) -> None:
        """Raises ValueError where an id of this tokenizer has no row in the embedding."""
        if self.vocab_size > model_vocab_size:
            index = self.vocab_size - 1
            raise ValueError(
                f"the tokenizer ({self.source}) has ids up to {index} ({self._table[index]!r}), "
                f"but the model's vocab_size is {model_vocab_size}; use the tokenizer the model "
                f"was trained with, or a model with more embedding rows"
            )

    def fewest_tokens(self, text: str) -> int:
        """Tokens that a text of this length has at least, known without encoding it."""
        return -(-len(text) // max(map(len, self._table.values())))

    def unused_ids(self, model_vocab_size: int) -> list[int]:
        """Ids the model can score but that stand for no token: never sample these."""
        return [index for index in range(model_vocab_size) if index not in self._table]

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """The token as the vocabulary spells it, None for an id without one."""
        return self._table.get(index)

    def token_bytes(self, index: int) -> bytes:
        """What the token adds inside a text; an id without a token adds nothing."""
        token = self._table.get(index)
        return b"" if token is None else self._detokenizer.pieces(token, False)

    # Text to ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, in which control tokens are recognised.

        With `add_special_tokens` the begin token the model expects is there exactly once,
        whether the text already starts with it or not; an end token, where the tokenizer adds
        one, is added as the reference does.
        """
        check_characters(text)
        ids = text_ids(self._backend, text)
        return self.wrap(ids) if add_special_tokens else ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text: control tokens in it are spelled out, none is added."""
        check_characters(text)
        if find_control_tokens(text, self.control_tokens):
            return self.aliased.encode(text)[0]
        return text_ids(self._backend, text)

    def wrap(self, ids: list[int]) -> list[int]:
        """`ids` with the begin token (once) and the end token the model expects around them."""
        is_there = list(ids[: len(self._before)]) == self._before
        return [*([] if is_there else self._before), *ids, *self._after]

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Tokens that steer the model rather than stand for text, with their ids.

        All special tokens, and those other added tokens that a chat template of this tokenizer
        writes (such as <tool_call>). Added tokens of white space are text.
        """
        templates = "\0".join(self.chat_templates.values())
        return {
            token.content: index
            for index, token in self._backend.get_added_tokens_decoder().items()
            if token.special or (token.content in templates and not token.content.isspace())
        }

    @functools.cached_property
    def aliased(self) -> AliasedEncoder:
        """The encoder in which control tokens fire only on request. Built on first use."""
        return AliasedEncoder(self._backend, self.control_tokens)

    # Ids to text

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids without a token (padding rows of the embedding) add nothing."""
        return self._detokenizer.decode(self._tokens(ids, skip_special_tokens))

    def decode_stream(self, *, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder fed one id at a time, whose deltas join to what `decode` returns."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def _tokens(self, ids: Iterable[int], skip_special_tokens: bool) -> Iterable[str]:
        for index in ids:
            token = self._table.get(int(index))
            if token is not None and not (skip_special_tokens and token in self._special):
                yield token

    # Files

    def save(self, folder: str | Path) -> list[Path]:
        """Write files from which transformers reads the same ids, and return their paths.

        A folder with a tokenizer.json is copied byte for byte; other sources get a generated
        tokenizer.json and tokenizer_config.json beside a copy of their own files.
        """
        return save_tokenizer.save(self, Path(folder))

    def _named_id(self, name: str) -> int | None:
        text = self.settings.named.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _added_by_encode(
        self, adds_bos: bool | None, adds_eos: bool | None
    ) -> tuple[list[int], list[int]]:
        """The ids before and after every text.

        For tokenizer.json (`adds_bos` None) its post-processor decides, as in transformers, and
        add_bos_token and add_eos_token can only add to it. Elsewhere these flags decide, and
        where they are silent the kind of file does.
        """
        bos_flag = self.settings.flag("add_bos_token")
        eos_flag = self.settings.flag("add_eos_token")
        if adds_bos is None:
            _check_any_text(self._backend, self.source)
        before, after = self._around() if adds_bos is None else ([], [])
        bos = bool(adds_bos) if bos_flag is None else bos_flag
        eos = bool(adds_eos) if eos_flag is None else eos_flag
        if bos and self.bos_token_id is not None:
            before = before or [self.bos_token_id]
        if eos and self.eos_token_ids:
            after = after or [self.eos_token_ids[0]]
        return before, after

    def _around(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts around a text."""
        text = self._backend.encode("a", add_special_tokens=False).ids
        with as_value_error(f"{self.source}: its post-processor is damaged"):
            whole = self._backend.encode("a").ids
        for start in range(len(whole) - len(text) + 1):
            if whole[start : start + len(text)] == text:
                return list(whole[:start]), list(whole[start + len(text) :])
        raise ValueError(f"{self.source}: the post-processor changes the text's own tokens")


class StreamDecoder:
    """Ids to text as they come. `push` and `flush` return the text that became certain."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = tokenizer._detokenizer.stream()

    def push(self, index: int) -> str:
        return "".join(map(self._stream.push, self._tokenizer._tokens([index], self._skip)))

    def flush(self) -> str:
        """The end of the text: bytes of an unfinished character come out as U+FFFD."""
        return self._stream.flush()


def _check_any_text(backend: tokenizers.Tokenizer, source: str) -> None:
    """Raises ValueError where some texts have no ids, before one of them comes."""
    with as_value_error(
        f"{source}: the vocabulary cannot spell every text, or a step before it is wrong; give the "
        f"model an unknown token that its vocabulary has, or mend the step"
    ):
        backend.encode(ANY_TEXT, add_special_tokens=False)


def _add_tokens(backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
    """Add the tokens that only the configuration names, at the ids it states."""
    present = backend.get_added_tokens_decoder()
    for index, fields in settings.added.items():
        flags = {
            name: bool(fields[name])
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if name in fields
        }
        token = AddedToken(fields["content"], **flags)
        if index in present and repr(present[index]) == repr(token):
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise ValueError(
                f"tokenizer_config.json's added_tokens_decoder gives {token.content!r} the id "
                f"{index} (or added_tokens.json does), but the vocabulary has "
                f"{backend.token_to_id(token.content)}"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    wanted = dict.fromkeys([*settings.named.values(), *settings.extra])
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in wanted if text not in known]
    )


def section(backend: tokenizers.Tokenizer, name: str) -> str:
    """One section of the tokenizer's JSON, without writing out the vocabulary."""
    part = getattr(backend, name)
    return "null" if part is None else part.__getstate__().decode()
