"""Quantizes the matrices of a model; OUT is a checkpoint folder of about that size.

int8 and fp8 have one scale for each output channel, int4 and nf4 one for every 64 values. With
-dynamic or -static behind them, int8 and int4 round activations to int8 too and multiply integers:
with a scale for each token at run time, or fixed ones measured on the rows of --calibration, whose
labels are not read. qat makes integers of a model trained with method qat, as it was trained to
have them. Embedding, head and router stay as they are unless --all is given. But for
-static, which runs the model, weights are read, quantized and written piece by piece."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.load import Model

HELP = "quantize a model's weights"
EXAMPLE = "llama-jax quantize smollm2-135m models/smollm2-int8 --scheme int8"

SCHEMES = (
    *("int8", "int4", "nf4", "fp8"),
    *("int8-dynamic", "int8-static", "int4-dynamic", "int4-static"),
    "qat",
)


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
        "--double",
        action="store_true",
        help="scales of int4 and nf4 in eight bits each: 4.14 instead of 4.5 bits a weight",
    )
    parser.add_argument(
        "--calibration",
        action="append",
        metavar="FILE",
        help="rows to measure activations on, for the -static schemes; may be given several times",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="how many of their tokens at most (default: %(default)s)",
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
    is_static = args.scheme.endswith("-static")
    if is_static != bool(args.calibration):
        raise ValueError(
            f"--scheme {args.scheme} needs rows to measure activations on; give --calibration FILE"
            if is_static
            else f"--calibration is for the -static schemes; {args.scheme} measures nothing"
        )
    if args.calibration_tokens < 1:
        raise ValueError(f"--calibration-tokens must be at least 1, not {args.calibration_tokens}")
    start_jax()
    from llama_jax import tree
    from llama_jax.formats.atomic import check_target

    check_target(out, overwrite=args.overwrite)
    make = _static if is_static else _converted if args.scheme == "qat" else _streamed
    before, params = make(args, out)
    return {
        "out": str(out),
        "scheme": args.scheme,
        "bytes": tree.num_bytes(params),
        "bytes_before": before,
        "file_bytes": num_bytes([out]),
    }


def _skip(args: argparse.Namespace) -> tuple[str, ...] | None:
    return () if args.all else tuple(args.skip) if args.skip else None


def _streamed(args: argparse.Namespace, out: Path) -> tuple[int, Any]:
    """(bytes before, the parameters as shape structs); no weight is ever whole in memory."""
    from llama_jax import tree
    from llama_jax.formats.checkpoint import save_streamed
    from llama_jax.load import load
    from llama_jax.weights.quantize import Quantization

    how = Quantization(args.scheme, args.tile, _skip(args), double=args.double)
    before = 0

    def read(into: Any) -> Any:
        def counted(config: Any, abstract: Any) -> Any:
            nonlocal before
            before = tree.num_bytes(abstract)
            return into(config, abstract)

        model = load(args.model, into=counted)
        return model.config, model.params, model.tokenizer

    _, params = save_streamed(out, read, quantization=how, overwrite=args.overwrite)
    return before, params


def _static(args: argparse.Namespace, out: Path) -> tuple[int, Any]:
    """The same with the model in memory, which runs to be measured."""
    from llama_jax import tree
    from llama_jax.config import Compute
    from llama_jax.formats.checkpoint import save_model
    from llama_jax.load import load
    from llama_jax.weights.calibrate import calibrate
    from llama_jax.weights.quantize import quantize

    rows = list(_rows(args.calibration))
    model = load(args.model)
    before = tree.num_bytes(model.params)
    batches = calibration_batches(model, rows, args.calibration_tokens)
    params = quantize(
        model.config,
        model.params,
        scheme=args.scheme,
        tile=args.tile,
        skip=_skip(args),
        double=args.double,
        peaks=calibrate(model.config, model.params, batches, compute=Compute()),
        donate=True,
    )
    save_model(out, model.config, params, model.tokenizer, overwrite=args.overwrite)
    return before, params


def _converted(args: argparse.Namespace, out: Path) -> tuple[int, Any]:
    """The integers of a model that was trained to have them."""
    from llama_jax import tree
    from llama_jax.formats.checkpoint import save_model
    from llama_jax.load import load
    from llama_jax.weights.qat_tree import convert_qat

    for name in ("tile", "skip", "double", "all"):
        if getattr(args, name):
            raise ValueError(f"--scheme qat converts what was trained; leave --{name} out")
    model = load(args.model)
    params = convert_qat(model.params)
    save_model(out, model.config, params, model.tokenizer, overwrite=args.overwrite)
    return tree.num_bytes(model.params), params


def _rows(files: list[str]) -> Any:
    from train.data.sources import read_rows

    return read_rows(files)


def calibration_batches(model: "Model", rows: Any, num_tokens: int) -> list[Any]:
    """The tokens of rows, one after the other, cut into batches [1, T] without padding."""
    import numpy as np

    from train.config import DataSection
    from train.data.render import render_rows
    from train.data.report import DataReport

    if model.tokenizer is None:
        raise ValueError("the model brings no tokenizer, so rows cannot be turned into tokens")
    length = min(512, model.config.max_position_embeddings)
    samples = render_rows(
        rows,
        model.tokenizer,
        DataSection(train=("rows",), long_rows="cut", long_texts="split"),
        sequence_length=length,
        train_all=False,
        report=DataReport(),
    )
    ids = [np.asarray(sample.ids) for sample in samples]
    if not ids:
        raise ValueError("the calibration rows hold no tokens")
    tokens = np.concatenate(ids)[:num_tokens].astype(np.int32)
    if len(tokens) < length:
        return [tokens[None]]
    whole = len(tokens) // length * length
    return list(tokens[:whole].reshape(-1, 1, length))


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    del args
    from llama_jax.commands.report import to_size

    before, after = report["bytes_before"], report["bytes"]
    print(
        f"{report['scheme']}: {to_size(before)} of weights became {to_size(after)} "
        f"({before / after:.2f} times smaller) in {report['out']}"
    )
