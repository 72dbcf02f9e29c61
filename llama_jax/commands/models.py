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

    from llama_jax.weights.table import weight_table

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
        "load": _formats(config, ("hf", "checkpoint", "gguf")),
        "export": _formats(config, ("hf", "peft", "gguf")),
        "train": ["full", "lora"],
    }


def _formats(config: "ModelConfig", names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name != "gguf" or config.model_type == "llama"]


def show(report: list[dict[str, Any]], args: argparse.Namespace) -> None:
    del args
    from llama_jax.commands.report import print_table

    columns = ("preset", "parameters", "layers", "hidden", "heads", "context", "can")
    rows = [
        (
            preset["name"],
            f"{preset['parameters'] / 1e9:.2f}e9",
            preset["layers"],
            preset["hidden_size"],
            f"{preset['heads']}/{preset['key_value_heads']}",
            preset["context"],
            f"train {'+'.join(preset['train'])}, export {'+'.join(preset['export'])}",
        )
        for preset in report
    ]
    print_table("Presets", columns, rows)
