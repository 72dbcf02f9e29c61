"""Quantizes the matrices of a model; OUT is a checkpoint folder of about that size.

int8 and fp8 have one scale for each output channel, int4 and nf4 one for every 64 values. With
-dynamic or -static behind them, int8 and int4 round activations to int8 too and multiply integers,
and fp8 rounds them to fp8: with a scale for each token at run time (of int8 and int4 with --tile:
for each tile of a token), or fixed ones measured on the rows of --calibration, whose labels are not
read. --method loses less than rounding
to nearest does: smoothquant and awq scale channels before it, gptq chooses codes by the inputs they
meet. qat makes integers of a model trained with method qat, as it was trained to have them.
Embedding, head and router stay as they are unless --all is given. But for -static and --method,
which run the model, weights are read, quantized and written piece by piece."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.load import Model

HELP = "quantize a model's weights"
EXAMPLE = "llama-jax quantize smollm2-135m models/smollm2-int8 --scheme int8"

SCHEMES = (
    *("int8", "int4", "nf4", "fp8"),
    *("int8-dynamic", "int8-static", "int4-dynamic", "int4-static", "fp8-dynamic", "fp8-static"),
    "qat",
)
METHODS = ("smoothquant", "awq", "gptq")
CALIBRATION_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", help="the checkpoint folder to write")
    parser.add_argument("--scheme", required=True, choices=SCHEMES)
    parser.add_argument(
        "--method",
        action="append",
        choices=METHODS,
        help="smoothquant (of -dynamic and -static) or awq (of the others), and gptq; may be given "
        "twice (default: to the nearest)",
    )
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
        help="rows to measure activations on, for the -static schemes and --method; may be given "
        "several times",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"how many of their tokens at most (default: {CALIBRATION_TOKENS})",
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
    measures = _measures(args)
    start_jax()
    from llama_jax import tree
    from llama_jax.formats.atomic import check_target

    check_target(out, overwrite=args.overwrite)
    make = _calibrated if measures else _converted if args.scheme == "qat" else _streamed
    before, params = make(args, out)
    return {
        "out": str(out),
        "scheme": args.scheme,
        "method": args.method or [],
        "bytes": tree.num_bytes(params),
        "bytes_before": before,
        "file_bytes": num_bytes([out]),
    }


def _measures(args: argparse.Namespace) -> bool:
    """Whether the model has to run. Raises ValueError for flags that contradict or miss
    something."""
    methods = args.method or []
    if len(set(methods)) < len(methods):
        raise ValueError(f"--method {methods[-1]} is given twice; keep one")
    if methods and args.scheme == "qat":
        raise ValueError("--scheme qat converts what was trained; leave --method out")
    is_integer = args.scheme.endswith(("-static", "-dynamic"))
    for method, fits in (("smoothquant", is_integer), ("awq", not is_integer)):
        if method in methods and not fits:
            other = "awq" if method == "smoothquant" else "smoothquant"
            raise ValueError(
                f"--method {method} is for schemes that "
                f"{'round' if method == 'smoothquant' else 'do not round'} activations; with "
                f"--scheme {args.scheme} use {other} or gptq"
            )
    measures = bool(methods) or args.scheme.endswith("-static")
    if measures != bool(args.calibration):
        what = f"--method {methods[0]}" if methods else f"--scheme {args.scheme}"
        raise ValueError(
            f"{what} needs rows to measure activations on; give --calibration FILE"
            if measures
            else f"--calibration is for the -static schemes and for --method; {args.scheme} alone "
            f"measures nothing"
        )
    if args.calibration_tokens is not None:
        if not measures:
            raise ValueError(
                "--calibration-tokens says how many tokens of --calibration to use; give that too, "
                "or leave it out"
            )
        if args.calibration_tokens < 1:
            raise ValueError(
                f"--calibration-tokens must be at least 1, not {args.calibration_tokens}"
            )
    return measures


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


def _calibrated(args: argparse.Namespace, out: Path) -> tuple[int, Any]:
    """The same with the model in memory, which runs to be measured."""
    from llama_jax import tree
    from llama_jax.formats.checkpoint import save_model
    from llama_jax.load import load

    rows = list(_rows(args.calibration))
    model = load(args.model)
    before = tree.num_bytes(model.params)
    params = quantize_calibrated(
        model,
        calibration_rows(model, rows, args.calibration_tokens or CALIBRATION_TOKENS),
        scheme=args.scheme,
        methods=args.method or (),
        tile=args.tile,
        skip=_skip(args),
        double=args.double,
    )
    save_model(out, model.config, params, model.tokenizer, overwrite=args.overwrite)
    return before, params


def quantize_calibrated(
    model: "Model",
    rows: list[Any],
    *,
    scheme: str,
    methods: Any,
    tile: int | None = None,
    skip: tuple[str, ...] | None = None,
    double: bool = False,
) -> Any:
    """The quantized parameters, measured on `rows` of token ids."""
    from llama_jax.config import Compute
    from llama_jax.weights.calibrate import calibrate
    from llama_jax.weights.gptq import gptq
    from llama_jax.weights.quantize import Quantization, quantize
    from llama_jax.weights.smooth import smooth

    config, params, compute = model.config, model.params, Compute()
    if "smoothquant" in methods or "awq" in methods:
        params = smooth(
            config,
            params,
            rows,
            scheme=scheme,
            tile=tile,
            skip=skip,
            double=double,
            compute=compute,
        )
    peaks = None
    if scheme.endswith("-static"):
        peaks = calibrate(config, params, rows, compute=compute)
    how = Quantization(scheme, tile, skip, double, peaks)
    rounded = quantize(config, params, **vars(how))
    if "gptq" not in methods:
        return rounded
    return gptq(config, params, rounded, rows, how=how, compute=compute)


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


def calibration_rows(model: "Model", rows: Any, num_tokens: int) -> list[Any]:
    """The token ids of rows, each as it would be read, `num_tokens` of them at most."""
    from train.data.render import render_rows
    from train.data.report import DataReport
    from train.sections.data import DataSection

    if model.tokenizer is None:
        raise ValueError("the model brings no tokenizer, so rows cannot be turned into tokens")
    samples = render_rows(
        rows,
        model.tokenizer,
        DataSection(train=("rows",), long_rows="cut", long_texts="split"),
        sequence_length=min(512, model.config.max_position_embeddings),
        train_all=False,
        report=DataReport(),
    )
    found, left = [], num_tokens
    for sample in samples:
        found.append(sample.ids[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    if not found:
        raise ValueError("the calibration rows hold no tokens")
    return found


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    del args
    from llama_jax.commands.report import to_size

    before, after = report["bytes_before"], report["bytes"]
    print(
        f"{report['scheme']}: {to_size(before)} of weights became {to_size(after)} "
        f"({before / after:.2f} times smaller) in {report['out']}"
    )
