"""Writing a tokenizer so that transformers reads the same ids."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.formats.tokenizer_files import TEMPLATE_FOLDER, TOKENIZER_FILES

if TYPE_CHECKING:
    from llama_jax.formats.tokenizer_class import Tokenizer

# Keys that would make transformers rebuild the ids its own way instead of reading tokenizer.json.
_REPLACED = ("tokenizer_class", "auto_map", "legacy", "add_prefix_space", "sp_model_kwargs",
             "vocab_file", "tokenizer_file", "name_or_path")  # fmt: skip


def save(tokenizer: "Tokenizer", folder: Path) -> list[Path]:
    """Copy the source files, and generate tokenizer.json where there was none."""
    folder.mkdir(parents=True, exist_ok=True)
    written = _copy(tokenizer.folder, folder) if tokenizer.folder is not None else []
    if folder / "tokenizer.json" not in written:
        for name, content in _generated(tokenizer).items():
            path = folder / name
            path.write_text(content, encoding="utf-8")
            written.append(path)
    return sorted(set(written))


def _copy(source: Path, folder: Path) -> list[Path]:
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    names += [str(path.relative_to(source)) for path in source.glob(f"{TEMPLATE_FOLDER}/*.jinja")]
    if not names:
        raise ValueError(f"{source}: the tokenizer's files are gone; load it again and save")
    written = []
    for name in names:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if not (target.exists() and target.samefile(source / name)):
            shutil.copyfile(source / name, target)
        written.append(target)
    return written


def _generated(tokenizer: "Tokenizer") -> dict[str, str]:
    description: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    description["post_processor"] = _post_processor(tokenizer)
    settings = tokenizer.settings
    config = {key: value for key, value in settings.raw.items() if key not in _REPLACED}
    config |= settings.named
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["add_bos_token"] = tokenizer.adds_bos
    config["add_eos_token"] = tokenizer.adds_eos
    config["clean_up_tokenization_spaces"] = False
    config.pop("chat_template", None)
    templates = tokenizer.chat_templates
    if set(templates) == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    config["added_tokens_decoder"] = {
        str(index): {
            "content": token.content,
            "single_word": token.single_word,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.normalized,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())
    }
    return {
        "tokenizer.json": json.dumps(description, ensure_ascii=False, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }


def _post_processor(tokenizer: "Tokenizer") -> dict[str, Any]:
    """Begin and end token around the text, as `Tokenizer.encode` writes them."""
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    eos = tokenizer.eos_token_ids[0] if tokenizer.adds_eos else None
    ids = {
        **({} if bos is None else {"bos_token": bos}),
        **({} if eos is None else {"eos_token": eos}),
    }
    names = {kind: tokenizer.id_to_token(index) for kind, index in ids.items()}

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        if "bos_token" in names:
            token = {"id": names["bos_token"], "type_id": type_id}
            parts.insert(0, {"SpecialToken": token})
        if "eos_token" in names:
            parts.append({"SpecialToken": {"id": names["eos_token"], "type_id": type_id}})
        return parts

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": [ids[kind]], "tokens": [name]} for kind, name in names.items()
        },
    }
