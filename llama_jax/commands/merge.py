"""Merges models as a recipe says; OUT is a Hugging Face folder.

RECIPE.yaml names a method and its inputs: chat_vector (base, chat, target, ratio), task_arithmetic,
ties and dare (base, models), linear (models), slerp (two models, t). Inputs are MODELs, and where
there is a base also PEFT adapters for it, whose sum may stay an adapter (output: adapter). Tensors
are read and written one at a time, so that a model larger than the memory merges too.
docs/merging.md has every key and the formulas."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

HELP = "merge models: chat vectors, task arithmetic, linear, SLERP, TIES, DARE"
EXAMPLE = "llama-jax merge recipe.yaml models/merged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("out", metavar="OUT", help="the Hugging Face folder to write")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="of one file of a model, such as 2GB (default: 5GB); an adapter is one file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that OUT holds")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.output import check_out, num_bytes
    from llama_jax.commands.report import Progress
    from llama_jax.commands.run_config import find_merge_recipe
    from llama_jax.commands.startup import start_jax
    from llama_jax.formats.json_fields import read_text
    from llama_jax.formats.yaml_text import parse_yaml
    from llama_jax.weights.merge_recipe import read_recipe

    path = find_merge_recipe(args.recipe)
    recipe = read_recipe(parse_yaml(read_text(path), str(path)), str(path))
    for _, model in recipe.inputs:
        out = check_out(args.out, model)
    start_jax()
    from llama_jax.merge.model import merge_models

    peak = _PeakMemory()
    merged = merge_models(
        recipe,
        out,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        progress=Progress().update,
    )
    return {
        "out": str(out),
        "method": recipe.method,
        "tensors": merged.tensors,
        "shared_rows": merged.shared_rows,
        "bytes": num_bytes(merged.files),
        "peak_host_bytes": peak.num_bytes(),
        "files": [str(file) for file in merged.files],
    }


class _PeakMemory:
    """The most memory this process has held at one time, mapped pages of files included.

    On Linux counted from when this was made, elsewhere from the start of the process.
    """

    def __init__(self) -> None:
        self._status = Path("/proc/self/status")
        if self._status.exists():
            # Where it is not permitted the peak counts from the process's start.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets VmHWM

    def num_bytes(self) -> int:
        if self._status.exists():
            for line in self._status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    from llama_jax.commands.report import to_size

    del args
    rows = report["shared_rows"]
    note = "" if rows is None else f", {rows} rows of the vocabulary merged"
    print(
        f"{report['tensors']} tensors, {to_size(report['bytes'])} in {report['out']}{note}; "
        f"at most {to_size(report['peak_host_bytes'])} of memory"
    )
