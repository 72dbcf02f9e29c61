"""Compiles every shipped config that names a TPU slice, and writes docs/proven-configs.md.

usage: python benchmarks/prove_configs.py [NAME ...]

With names, only those are compiled and their lines written anew. Needs the `tpu` extra, no TPU;
some ten minutes on two cores. Ends with 1 when a config does not fit the slice it names.
"""

import datetime
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from llama_jax.mesh.slices import slice_named
from train.config import load_run_config
from train.fit import Fit, fit

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "proven-configs.md"
COLUMNS = (
    "config", "method", "slice", "rows x tokens", "arguments", "temporaries", "together", "limit",
    "operations a step", "formula", "bound s", "by", "compiled in s",
)  # fmt: skip

HEAD = """# Proven configs

Every config that names a TPU slice, its real training step compiled for that slice by the TPU
compiler, without a TPU. `python benchmarks/prove_configs.py` writes this page; `llama-jax fit`
does the same for one run.

GiB are of one chip, as the compiler counts them; the limit is what it grants a program. Operations
are those of all chips for one step, counted on the traced step, and beside them by formula. The
bound is the longest of the times that a chip's published peak rates allow for the counted products,
memory traffic and collectives: no step can be faster, how fast one is was not measured.

"""


def main() -> int:
    shipped = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    lines = kept_lines() if sys.argv[1:] else {}
    fits = True
    for name in sys.argv[1:] or shipped:
        run = load_run_config(ROOT / "configs" / name)
        if run.mesh.slice is None:
            continue
        result = fit(run, slice_named(run.mesh.slice))
        lines[name] = line(name, result)
        fits &= result.compiled.fits
        print(lines[name], flush=True)
    PAGE.write_text(page([lines[name] for name in shipped if name in lines]))
    return 0 if fits else 1


def kept_lines() -> dict[str, str]:
    """The page's lines, by config."""
    cells = [(each.split("`"), each) for each in PAGE.read_text().splitlines()]
    return {parts[1]: each for parts, each in cells if each.startswith("| `")}


def page(lines: list[str]) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    when = datetime.date.today().isoformat()
    where = f"{platform.machine()}, {os.cpu_count()} cores"
    table = [row(COLUMNS), row(["---"] * len(COLUMNS)), *lines]
    return HEAD + "\n".join(table) + f"\n\n{when}, {versions}, {where}.\n"


def line(name: str, result: Fit) -> str:
    report = result.to_dict()
    formula = report["closed_form_flops"]
    return row(
        [
            f"`{name}`",
            report["method"],
            report["slice"],
            f"{report['batch_size']} x {report['sequence_length']}",
            *(
                f"{report[key] / 2**30:.2f}"
                for key in (
                    "arguments_bytes_per_chip",
                    "temporaries_bytes_per_chip",
                    "hbm_bytes_per_chip",
                    "hbm_limit",
                )
            ),
            f"{report['flops_per_step']:.4g}",
            "" if formula is None else f"{formula:.4g}",
            f"{max(report['bound_seconds'].values()):.3g}",
            report["bound_by"],
            f"{report['compile_seconds']:.0f}",
        ]
    )


def row(cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main())
