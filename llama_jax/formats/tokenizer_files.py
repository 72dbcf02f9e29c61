"""Reading tokenizer_config.json and its companions. Plain JSON and text only.

Files that hold code or pickles are never opened, and keys that point to code (auto_map, a
tokenizer_class of the repository) are never followed: ids come from the vocabulary files alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.formats.json_fields import read_json, read_text, shorten

# All files transformers may read for a tokenizer, copied as they are on export.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TEMPLATE_FOLDER = "additional_chat_templates"

NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerSettings:
    """What the JSON files beside the vocabulary say.

    `named` maps bos_token, eos_token, … to the token's text. `added` maps ids to the fields of an
    added token. `extra` are further special tokens by text. `raw` is tokenizer_config.json.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    def flag(self, name: str) -> bool | None:
        """A true/false key; None where it is absent or null."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"tokenizer_config.json: {name} must be true or false, got {value!r}")
        return value


def read_settings(folder: Path) -> TokenizerSettings:
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    named: dict[str, str] = {}
    for name in NAMED_TOKENS:
        text = _token_text(config.get(name), f"{folder / 'tokenizer_config.json'}: {name}")
        if text is None:
            text = _token_text(special.get(name), f"{folder / 'special_tokens_map.json'}: {name}")
        if text is not None:
            named[name] = text
    settings = TokenizerSettings(
        named=named,
        added=_added_tokens(config, folder),
        extra=tuple(_extra_tokens({**special, **config}, folder)),
        chat_templates=_chat_templates(folder, config),
        raw=config,
    )
    if settings.flag("split_special_tokens"):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: split_special_tokens true is not supported, "
            f"chat templates could not write control tokens; set it to false"
        )
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json(path)


def _token_text(value: Any, where: str) -> str | None:
    """Tokens are written as text or as an object with the field content."""
    if value is None:
        return None
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"{where} must be text or an object with content, neither empty, got "
            f"{shorten(value)}; where there is no such token, remove it or set it to null"
        )
    return text


def _added_tokens(config: Mapping[str, Any], folder: Path) -> dict[int, Mapping[str, Any]]:
    added: dict[int, Mapping[str, Any]] = {}
    stated = config.get("added_tokens_decoder") or {}
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    if not isinstance(stated, dict):
        raise ValueError(f"{where} must be an object, got {shorten(stated)}")
    for key, token in stated.items():
        if not key.isdecimal():
            raise ValueError(f"{where}[{key!r}]: the key must be a token id")
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{where}[{key!r}] must be an object with content, got {token!r}")
        for name in _ADDED_FLAGS:
            if not isinstance(token.get(name, False), bool):
                raise ValueError(
                    f"{where}[{key!r}]: {name} must be true or false, got {shorten(token[name])}"
                )
        added[int(key)] = token
    old_style = folder / "added_tokens.json"
    for text, index in _read_json(old_style).items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"{old_style}: {text!r} has {shorten(index)}; it must be a token id")
        added.setdefault(index, {"content": text, "normalized": True, "special": False})
    return dict(sorted(added.items()))


def _extra_tokens(config: Mapping[str, Any], folder: Path) -> list[str]:
    texts = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or []
        if not isinstance(value, dict | list):
            raise ValueError(f"{folder}: {key} must be a list of tokens, got {shorten(value)}")
        for token in value.values() if isinstance(value, dict) else value:
            text = _token_text(token, f"{folder}: {key}")
            if text is not None and text not in texts:
                texts.append(text)
    return texts


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name. A .jinja file beats the key chat_template, as in transformers."""
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    templates = named_templates(config.get("chat_template"), where)
    if not templates:
        file = folder / "chat_template.json"
        templates = named_templates(_read_json(file).get("chat_template"), str(file))
    default = folder / "chat_template.jinja"
    if default.is_file():
        templates["default"] = read_text(default)
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        templates[path.stem] = read_text(path)
    return templates


def named_templates(value: Any, where: str) -> dict[str, str]:
    """A chat_template value: one text, a list of {name, template}, or an object by name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        named: dict[str, Any] = {}
        for entry in value:
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or "template" not in entry:
                raise ValueError(
                    f"{where}: every template in a list needs name and template, both text, got "
                    f"{shorten(entry)}"
                )
            if name in named:
                raise ValueError(f"{where}: two templates are called {name!r}; remove one")
            named[name] = entry["template"]
        value = named
    if not isinstance(value, dict) or not all(isinstance(t, str) for t in value.values()):
        raise ValueError(f"{where} must be text or a list of named texts, got {value!r:.100}")
    return dict(value)
