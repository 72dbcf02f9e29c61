"""Converts a model to a llama-jax checkpoint, with the numbers it has.

Weights are read and written piece by piece. A checkpoint keeps quantized and adapted weights, is
checked when it is read, and is placed on any mesh."""

import argparse
from typing import Any

HELP = "convert a model to a llama-jax checkpoint"
EXAMPLE = "llama-jax convert smollm2-135m models/smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", help="the checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that OUT holds")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.output import check_out, num_bytes
    from llama_jax.commands.startup import start_jax

    out = check_out(args.out, args.model)
    start_jax()
    from llama_jax import tree
    from llama_jax.formats.atomic import check_target
    from llama_jax.formats.checkpoint import save_streamed
    from llama_jax.load import load

    check_target(out, overwrite=args.overwrite)

    def read(into: Any) -> Any:
        model = load(args.model, into=into)
        return model.config, model.params, model.tokenizer

    _, params = save_streamed(out, read, overwrite=args.overwrite)
    leaves = tree.flatten(params).values()
    return {
        "out": str(out),
        "parameters": sum(_num_values(leaf) for leaf in leaves),
        "bytes": num_bytes([out]),
    }


def _num_values(leaf: Any) -> int:
    """Values of the matrix a leaf stands for, however it is stored."""
    import math

    return math.prod(leaf.shape)


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    del args
    from llama_jax.commands.report import to_size

    print(f"{report['parameters']:,} parameters, {to_size(report['bytes'])} in {report['out']}")
