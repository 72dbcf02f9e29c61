"""A MODEL with, if one is named, a PEFT adapter on it: what --adapter means everywhere."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.load import Model


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", metavar="DIR", help="a PEFT adapter folder to put on the model"
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="let the model grow to the vocabulary of an adapter that has more tokens",
    )


def load_adapted(args: argparse.Namespace) -> "Model":
    """Loads args.model; raises ValueError for an adapter that does not fit, and for an empty
    name."""
    from llama_jax.load import load

    if args.adapter is not None and not args.adapter.strip():
        # An empty path would be the current folder.
        raise ValueError("the adapter's name is empty; give a PEFT adapter folder")
    if args.resize and args.adapter is None:
        raise ValueError("--resize says what an adapter may do; it needs --adapter")
    return load(args.model, adapter=args.adapter, resize=args.resize)
