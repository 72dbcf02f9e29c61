"""Copies a model into a registry as a new version, which a running server can load.

The registry is a folder models/NAME/VERSION/. A version never changes once it is written: its
manifest lists every file with its SHA-256, and the server checks them before it loads it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.load import Model

HELP = "add a version of a model to a registry"
EXAMPLE = "llama-jax register smollm2-135m --models-dir models --name smollm2 --version 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--models-dir", required=True, metavar="DIR", help="the registry")
    parser.add_argument("--name", required=True, help="what requests will call it")
    parser.add_argument("--version", required=True, metavar="V", help="such as 1 or 2026-03-01")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter to put on it")
    parser.add_argument("--template", metavar="FILE", help="a chat template in place of its own")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from infer.registry import Manifest, register
    from llama_jax.formats.chat import check_templates
    from llama_jax.load import find_model, load_abstract
    from llama_jax.weights.quantize import stored_types

    for path in (args.adapter, args.template):
        if path is not None and not Path(path).exists():
            raise ValueError(f"{path} does not exist")
    # What cannot be read is refused before anything is copied.
    model, path = load_abstract(args.model), find_model(args.model)
    if args.adapter is not None:
        _check_adapter(Path(args.adapter), model)
    if args.template is not None:
        _check_template(Path(args.template), model)
    else:
        check_templates(model.tokenizer)
    target = register(
        args.models_dir,
        args.name,
        args.version,
        path,
        source=args.model,
        quantization=_block_types(path) if path.is_file() else stored_types(model.params),
        adapter=None if args.adapter is None else Path(args.adapter),
        template=None if args.template is None else Path(args.template),
    )
    manifest = Manifest.read(target)
    return {
        "path": str(target),
        "name": args.name,
        "version": args.version,
        "files": len(manifest.files),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "quantization": manifest.quantization,
    }


def _check_adapter(folder: Path, model: "Model") -> None:
    """Raises ValueError for what is no PEFT adapter of such a model."""
    from llama_jax.formats.peft import load_adapter, stores_embeddings
    from llama_jax.formats.peft_config import read_adapter_config
    from llama_jax.weights.table import abstract_params

    read_adapter_config(folder)
    # Stored embeddings are compared with the model's own, which are not read here.
    if not stores_embeddings(folder):
        load_adapter(folder, model.config, abstract_params(model.config))


def _check_template(path: Path, model: "Model") -> None:
    """Raises ValueError for a template that does not compile or reaches out of its sandbox."""
    from llama_jax.formats.chat import ChatTemplate, TemplateError
    from llama_jax.formats.json_fields import read_text

    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; give a chat template, or leave --template out")
    tokens = None if model.tokenizer is None else model.tokenizer.special_tokens
    try:
        ChatTemplate(text, special_tokens=tokens).check_safe()
    except TemplateError as error:
        raise ValueError(f"{path}: {error}") from error


def _block_types(path: Path) -> str | None:
    """The types of the blocks in a GGUF file, such as Q4_0, which loading turns into numbers."""
    from llama_jax.formats.gguf_reader import GGUFFile

    tensors = GGUFFile(path).tensors.values()
    return (
        ", ".join(sorted({each.kind.name for each in tensors if each.block_elements > 1})) or None
    )


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    from llama_jax.commands.report import to_size

    del args
    print(
        f"{report['name']} version {report['version']}: {report['files']} files, "
        f"{to_size(report['bytes'])}, in {report['path']}"
    )
