"""Proves that a run, or a server, fits a TPU slice before the slice is paid for.

The run's real training step is compiled by the real TPU compiler, on this machine and without a
TPU: bytes a chip are the compiler's own. Times are bounds from published peak rates. Slices count
chips (v5e-16, v5p-64, 2xv5e-256 for two slices). With --serve CONFIG.yaml is one of a server, whose
every step is compiled; the most tokens that its cache can hold are found. Needs the tpu extra,
which brings the compiler."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from llama_jax.commands import fit_serve, run_config

HELP = "compile a run for TPU slices on this CPU and show whether it fits"
EXAMPLE = "llama-jax fit llama3.1-8b-lora-v5e-8.yaml --slice v5e-16 --slice v6e-8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_config.add_arguments(parser)
    parser.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="SLICE",
        help="what to compile for; may be repeated (default: mesh.slice of the config)",
    )
    parser.add_argument(
        "--serve", action="store_true", help="CONFIG.yaml holds the settings of `llama-jax serve`"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="with --slice: the largest batch for each recomputation policy; without: the "
        "smallest slice of the generation that mesh.slice names",
    )
    parser.add_argument(
        "--memory-table",
        action="store_true",
        help="instead: bytes a chip of weights, gradients, optimizer state and activations for "
        "this model under full, LoRA, QLoRA and inference",
    )
    parser.add_argument(
        "--save-cache",
        metavar="DIR",
        help="keep the compiled programs as entries of JAX's compilation cache",
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    from llama_jax.commands.report import Progress
    from llama_jax.mesh.slices import slice_named

    if args.serve:
        return fit_serve.run(args)
    config = run_config.load(args)
    named = args.slice or ([config.mesh.slice] if config.mesh.slice else [])
    if not named:
        raise ValueError(
            f"{args.config} names no slice in mesh.slice; give one with --slice, such as v5e-16"
        )
    slices = [slice_named(name) for name in named]
    if args.memory_table and args.search:
        raise ValueError("--memory-table and --search answer different questions; keep one")
    start_compiler(args.save_cache)
    from train.fit import best, fit, largest_batches, smallest_slices

    progress = Progress()
    if args.memory_table:
        from train.memory_table import memory_table

        return [
            {"slice": each.name, **row.to_dict()}
            for each in slices
            for row in memory_table(config, each, progress.say)
        ]
    if args.search:
        say = progress.say
        searches = (
            [largest_batches(config, each, say) for each in slices]
            if args.slice
            else [smallest_slices(config, each.generation, say) for each in slices]
        )
        reports = []
        for search in searches:
            results = list(search)
            chosen = best(results)
            reports += [{**each.to_dict(), "best": each is chosen} for each in results]
        return reports
    reports = []
    for number, each in enumerate(slices):
        progress.update(number, len(slices), f"compiling for {each.describe()}")
        reports.append(fit(config, each).to_dict())
    progress.update(len(slices), len(slices), "compiled")
    return reports


def start_compiler(folder: str | None) -> None:
    """JAX on the CPU: a TPU that may be here is left alone."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("the TPU compiler is not installed; pip install 'llama-jax[tpu]'")
    import jax

    if folder is not None:
        if not folder.strip():
            raise ValueError("--save-cache is empty; name a folder")
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"--save-cache {folder} is a file; name a folder")
        Path(folder).mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()  # one that is open already goes on in its own folder


def show(report: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from llama_jax.commands.report import print_table

    if args.serve:
        fit_serve.show(report)
        return
    if args.memory_table:
        by_method = ("slice", "method", *_PARTS, "together", "of", "fits")
        print_table("GiB a chip", by_method, [_memory_line(each) for each in report])
        return
    for each in report:
        print_table(title(each), ("a chip", "value"), _rows(each))
        for line in each["advice"]:
            print(f"  {line}")
    if len(report) > 1:
        columns = ("slice", "batch", "remat", "GiB a chip", "of", "fits", "bound s/step", "best")
        print_table("Compared", columns, [_line(each) for each in report])
    if args.save_cache:
        sys.stderr.write(
            f"compiled programs are in {args.save_cache}. A TPU start reuses them only with the "
            f"same versions of jax and libtpu, the same slice, and compiler flags; JAX says so "
            f"with JAX_EXPLAIN_CACHE_MISSES=1. No TPU was here to try it\n"
        )


_PARTS = ("weights", "gradients", "optimizer", "cache", "activations")


def _memory_line(each: dict[str, Any]) -> tuple[str, ...]:
    sizes = (f"{each[name] / 2**30:.2f}" for name in (*_PARTS, "total", "limit"))
    return (each["slice"], each["method"], *sizes, "yes" if each["fits"] else "no")


def title(each: dict[str, Any]) -> str:
    word = "fits" if each["fits"] else "does not fit"
    return (
        f"{each['slice']} ({each['chips']} chips, {each['topology']}, Cloud's "
        f"{each['cloud_accelerator_type']}): {word}"
    )


def gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def _rows(each: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("arguments", gib(each["arguments_bytes_per_chip"])),
        ("temporaries", gib(each["temporaries_bytes_per_chip"])),
        ("outputs beside arguments", gib(each["outputs_bytes_per_chip"])),
        ("program", gib(each["code_bytes_per_chip"])),
        ("together", f"{gib(each['hbm_bytes_per_chip'])} of {gib(each['hbm_limit'])}"),
    ]
    if not each["fits"]:
        rows.append(("missing", f"{gib(each['missing_bytes_per_chip'])}"))
    rows.append(("operations of a step, all chips", f"{each['flops_per_step']:.4g}"))
    if each["closed_form_flops"] is not None:
        rows.append(("  by formula", f"{each['closed_form_flops']:.4g}"))
    rows.append(("  without doing any twice", f"{each['model_flops_per_step']:.4g}"))
    rows.append(("memory traffic", gib(each["bytes_accessed_per_chip"])))
    for kind, sent in (each["collectives"] or {}).items():
        over = f", {gib(sent['dcn_bytes_per_chip'])} between slices"
        rows.append(
            (
                f"{kind} sends",
                f"{sent['count']} x, {gib(sent['bytes_per_chip'])}"
                + (over if sent["dcn_bytes_per_chip"] else ""),
            )
        )
    for name, seconds in each["bound_seconds"].items():
        mark = ", the bound" if name == each["bound_by"] else ""
        rows.append((f"{name} takes at least", f"{seconds:.4g} s{mark}"))
    rows.append(("tokens/s at most, all chips", f"{each['bound_tokens_per_second']:.4g}"))
    rows.append(("compiled in", f"{each['compile_seconds']:.1f} s"))
    return rows


def _line(each: dict[str, Any]) -> tuple[str, ...]:
    bound = max(each["bound_seconds"].values())
    return (
        each["slice"],
        str(each["batch_size"]),
        each["remat"],
        f"{each['hbm_bytes_per_chip'] / 2**30:.2f}",
        f"{each['hbm_limit'] / 2**30:.2f}",
        "yes" if each["fits"] else "no",
        f"{bound:.4g}" if each["fits"] else "",
        "*" if each.get("best") else "",
    )
