"""Quantizes the matrices of a model, weights only; OUT is a checkpoint folder of about that size.

int8 and fp8 have one scale for each output channel, int4 and nf4 one for every 64 values.
Embedding, head and router stay as they are unless --all is given."""

import argparse
from typing import Any

HELP = "quantize a model's weights"
EXAMPLE = "llama-jax quantize smollm2-135m models/smollm2-int8 --scheme int8"

SCHEMES = ("int8", "int4", "nf4", "fp8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", help="the checkpoint folder to write")
    parser.add_argument("--scheme", required=True, choices=SCHEMES)
    parser.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="how many neighbouring values share a scale (default: the scheme's own)",
    )
    parser.add_argument(
        "--skip",
        action="append",
        metavar="PATTERN",
        help="weights to leave alone, such as lm_head or layers.self_attn.*; may be given several "
        "times and replaces the default (embedding, head and router)",
    )
    parser.add_argument(
        "--all", action="store_true", help="leave nothing alone but norms and biases"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that OUT holds")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.output import check_out, num_bytes
    from llama_jax.commands.startup import start_jax

    out = check_out(args.out, args.model)
    if args.all and args.skip:
        raise ValueError("--all and --skip contradict each other; keep one")
    start_jax()
    from llama_jax import tree
    from llama_jax.formats.atomic import check_target
    from llama_jax.formats.checkpoint import save_model
    from llama_jax.load import load
    from llama_jax.weights.quantize import quantize

    check_target(out, overwrite=args.overwrite)
    model = load(args.model)
    before = tree.num_bytes(model.params)
    params = quantize(
        model.config,
        model.params,
        scheme=args.scheme,
        tile=args.tile,
        skip=[] if args.all else args.skip,
        donate=True,
    )
    save_model(out, model.config, params, model.tokenizer, overwrite=args.overwrite)
    return {
        "out": str(out),
        "scheme": args.scheme,
        "bytes": tree.num_bytes(params),
        "bytes_before": before,
        "file_bytes": num_bytes([out]),
    }


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    del args
    from llama_jax.commands.report import to_size

    before, after = report["bytes_before"], report["bytes"]
    print(
        f"{report['scheme']}: {to_size(before)} of weights became {to_size(after)} "
        f"({before / after:.2f} times smaller) in {report['out']}"
    )
