"""Makes a model sparser or smaller; OUT is a Hugging Face folder.

--sparsity or --pattern N:M set single weights of the layers' matrices to exactly zero, by magnitude
or, with --method wanda, by magnitude times the size of the input. --layers, --kv-heads and --units
leave out what matters least and give a smaller dense model. Wanda and --layers need --calibration,
rows that the model is run on; heads and units are judged better with it.

`model.keep_zeros: true` in a run config keeps zeros through further training; docs/pruning.md has
the way from pruning over distillation to an export."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.load import Model
    from llama_jax.weights.importance import Importance

HELP = "prune weights, layers, heads or feed-forward units"
EXAMPLE = "llama-jax prune smollm2-135m models/pruned --sparsity 0.5"

METHODS = ("magnitude", "wanda")
CALIBRATION_ROWS = 64
CALIBRATION_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", help="the Hugging Face folder to write")
    parser.add_argument("--sparsity", type=float, metavar="S", help="part of each matrix to zero")
    parser.add_argument("--pattern", metavar="N:M", help="keep N of every M neighbours, as in 2:4")
    parser.add_argument(
        "--method", choices=METHODS, help="what single weights are judged by (default: magnitude)"
    )
    parser.add_argument(
        "--skip",
        action="append",
        metavar="PATTERN",
        help="matrices to leave alone, such as down_proj; may be given several times",
    )
    parser.add_argument("--layers", type=int, metavar="L", help="layers to keep")
    parser.add_argument("--kv-heads", type=int, metavar="K", help="key/value heads to keep")
    parser.add_argument("--units", type=int, metavar="F", help="feed-forward units to keep")
    parser.add_argument(
        "--calibration", nargs="+", metavar="F.jsonl", help="files of text or chat rows"
    )
    parser.add_argument(
        "--calibration-rows",
        type=int,
        metavar="N",
        help=f"how many of them to use, up to {CALIBRATION_TOKENS} tokens each "
        f"(default: {CALIBRATION_ROWS})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that OUT holds")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.output import check_out, num_bytes
    from llama_jax.commands.startup import start_jax

    out = check_out(args.out, args.model)
    pattern = _check(args)
    rows = None
    if args.calibration:
        from train.data.sources import read_rows

        rows = list(read_rows(args.calibration))
    start_jax()
    from llama_jax.formats.atomic import check_target
    from llama_jax.load import load, save_hf
    from llama_jax.weights.cut import check_plain
    from llama_jax.weights.prune import prunable, prune_weights, sparsity_of
    from llama_jax.weights.table import num_parameters

    check_target(out, overwrite=args.overwrite)
    model = load(args.model)
    check_plain(model.params)
    before = num_parameters(model.config)
    report: dict[str, Any] = {"out": str(out)}
    if any(value is not None for value in (args.layers, args.kv_heads, args.units)):
        model = _smaller(args, model, rows, report)
    if args.sparsity is not None or pattern is not None:
        importance = None
        if args.method == "wanda":
            assert rows is not None
            importance = _measured(args, model, rows)
        params = prune_weights(
            model.config,
            model.params,
            sparsity=args.sparsity,
            pattern=pattern,
            importance=importance,
            skip=args.skip or (),
        )
        model = _with(model, model.config, params)
    paths = prunable(model.config, args.skip or ())
    files = save_hf(model, out, overwrite=args.overwrite)
    return {
        **report,
        "sparsity": sparsity_of(model.params, paths),
        "sparsity_of_model": sparsity_of(model.params, _all_paths(model)),
        "parameters": num_parameters(model.config),
        "parameters_before": before,
        "bytes": num_bytes(files),
    }


def _check(args: argparse.Namespace) -> tuple[int, int] | None:
    """The N:M pattern, if any. Raises ValueError for flags that contradict or miss something."""
    single = args.sparsity is not None or args.pattern is not None
    structure = any(value is not None for value in (args.layers, args.kv_heads, args.units))
    if args.sparsity is not None and args.pattern is not None:
        raise ValueError("--sparsity and --pattern both say how much to zero; keep one")
    if not single and not structure:
        raise ValueError(
            "nothing to prune: give --sparsity or --pattern, or --layers, --kv-heads or --units"
        )
    if not single and (args.method or args.skip):
        flag = "--method" if args.method else "--skip"
        raise ValueError(
            f"{flag} is about single weights; give --sparsity or --pattern, or drop it"
        )
    if args.calibration is None:
        for needs, flag in (
            (args.method == "wanda", "--method wanda"),
            (args.layers is not None, "--layers"),
        ):
            if needs:
                raise ValueError(f"{flag} judges by activations; give --calibration F.jsonl")
    elif not structure and args.method != "wanda":
        raise ValueError("--calibration is not read by --method magnitude; use wanda or drop it")
    if args.calibration_rows is not None:
        if args.calibration is None:
            raise ValueError(
                "--calibration-rows says how many rows of --calibration to use; give that too, or "
                "leave it out"
            )
        if args.calibration_rows < 1:
            raise ValueError(f"--calibration-rows must be at least 1, not {args.calibration_rows}")
    return None if args.pattern is None else _pattern(args.pattern)


def _pattern(text: str) -> tuple[int, int]:
    kept, colon, group = text.partition(":")
    if not colon or not kept.isdecimal() or not group.isdecimal():
        raise ValueError(f"--pattern {text!r} is not of the form N:M, such as 2:4")
    return int(kept), int(group)


def _smaller(
    args: argparse.Namespace, model: "Model", rows: Any, report: dict[str, Any]
) -> "Model":
    """Layers first: what the others add is then measured where it will be used."""
    from llama_jax.weights.prune import drop_heads, drop_layers, drop_units

    config, params = model.config, model.params
    if args.layers is not None:
        importance = _measured(args, model, rows)
        report["influence"] = [float(x) for x in importance.influence]
        config, params, report["layers"] = drop_layers(config, params, args.layers, importance)
        model = _with(model, config, params)
    for keep, drop in ((args.kv_heads, drop_heads), (args.units, drop_units)):
        if keep is not None:
            found = _measured(args, model, rows) if rows is not None else None
            config, params = drop(config, params, keep, found)
            model = _with(model, config, params)
    return model


def _with(model: "Model", config: Any, params: Any) -> "Model":
    import dataclasses

    return dataclasses.replace(model, config=config, params=params)


def _measured(args: argparse.Namespace, model: "Model", rows: Any) -> "Importance":
    from llama_jax.config import Compute
    from llama_jax.weights.importance import measure
    from train.data.render import render_rows
    from train.data.report import DataReport
    from train.sections.data import DataSection

    if model.tokenizer is None:
        raise ValueError("the model brings no tokenizer, so rows cannot be turned into tokens")
    for row in rows:
        if row.kind == "preference":
            raise ValueError(f"{row.where}: calibration takes text, chat and instruction rows")
    length = min(CALIBRATION_TOKENS, model.config.max_position_embeddings)
    data = DataSection(train=tuple(args.calibration), long_rows="cut", long_texts="cut")
    samples = render_rows(
        rows[: args.calibration_rows or CALIBRATION_ROWS],
        model.tokenizer,
        data,
        sequence_length=length,
        train_all=True,
        report=DataReport(),
    )
    return measure(
        model.config, model.params, (sample.ids for sample in samples), compute=Compute()
    )


def _all_paths(model: "Model") -> list[str]:
    from llama_jax import tree

    return list(tree.flatten(model.params))


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    from llama_jax.commands.report import to_size

    del args
    print(
        f"{report['parameters']:,} of {report['parameters_before']:,} parameters, "
        f"{report['sparsity']:.1%} of the layers' matrices zero, "
        f"{to_size(report['bytes'])} in {report['out']}"
    )
    if "layers" in report:
        print(f"layers kept: {', '.join(map(str, report['layers']))}")
