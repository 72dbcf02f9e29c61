"""The presets: their shapes, and what is supported for each.

A preset names a published architecture; its weights come from a folder, a GGUF file or the Hub."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.config import ModelConfig

HELP = "the presets and what is supported for each"
EXAMPLE = "llama-jax models --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # there is nothing to choose


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    del args
    from llama_jax.presets import presets

    return [describe(name, config) for name, config in presets.items()]


def describe(name: str, config: "ModelConfig") -> dict[str, Any]:
    """What one preset is and what can be done with it."""
    import math
    from typing import get_args, get_type_hints

    from llama_jax.commands.export import FORMATS
    from llama_jax.commands.quantize import SCHEMES
    from llama_jax.weights.table import weight_table
    from train.config import RunConfig

    return {
        "name": name,
        "family": config.model_type,
        "parameters": sum(math.prod(weight.shape) for weight in weight_table(config).values()),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "rope_scaling": config.rope_scaling.rope_type if config.rope_scaling else None,
        "experts": config.moe.num_local_experts if config.moe else None,
        "tied_embeddings": config.tie_word_embeddings,
        "dtype": config.dtype,
        "load": ["hf", "compressed-tensors", "gguf", "checkpoint"],
        "export": list(FORMATS),
        "train": [
            method
            for method in get_args(get_type_hints(RunConfig)["method"])
            if method != "qat" or _is_quantized_by(config, method)
        ],
        "quantize": [scheme for scheme in SCHEMES if _is_quantized_by(config, scheme)],
    }


def _is_quantized_by(config: "ModelConfig", scheme: str) -> bool:
    """Whether a model of this shape is taken, with what is skipped by default."""
    from llama_jax.weights.quantize import Quantization
    from llama_jax.weights.table import abstract_params, weight_table

    # What qat trains for are products of integers with dynamic activations.
    scheme = "int8-dynamic" if scheme == "qat" else scheme
    # Of every weight, as a calibration would have it.
    peaks: Any = dict.fromkeys(weight_table(config)) if scheme.endswith("-static") else None
    try:
        Quantization(scheme, peaks=peaks).chosen(config, abstract_params(config))
    except ValueError:
        return False
    return True


def show(report: list[dict[str, Any]], args: argparse.Namespace) -> None:
    del args
    from llama_jax.commands.report import print_table

    columns = ("preset", "parameters", "layers", "hidden", "heads", "experts", "context", "rope")
    rows = [
        (
            preset["name"],
            f"{preset['parameters'] / 1e9:.2f}e9",
            preset["layers"],
            preset["hidden_size"],
            f"{preset['heads']}/{preset['key_value_heads']}",
            preset["experts"] or "",
            preset["context"],
            preset["rope_scaling"] or "",
        )
        for preset in report
    ]
    print_table("Presets", columns, rows)
    # Almost the same for every preset: the rooms know the weight table, not the family.
    for name in ("load", "train", "quantize", "export"):
        presets_of: dict[tuple[str, ...], list[str]] = {}
        for preset in report:
            presets_of.setdefault(tuple(preset[name]), []).append(preset["name"])
        most = max(presets_of, key=lambda kinds: len(presets_of[kinds]))
        print(f"{name}: {', '.join(most)}")
        for kinds, names in presets_of.items():
            if kinds != most:
                print(f"  of {', '.join(names)}: {', '.join(kinds)}")
