"""Scaling on paper: the same step on more chips and more slices, and what bounds it.

usage: python benchmarks/scaling.py [CASE ...]

Writes docs/scaling.md. With cases, numbers from 0 on, only those are compiled and nothing is
written. Needs the `tpu` extra, no TPU; a quarter of an hour on two cores.
"""

import datetime
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from llama_jax.mesh.slices import slice_named
from train.config import load_run_config
from train.fit import fit

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"

# Shipped config, slice, rows of the batch for each eight chips, further overrides.
CASES = (
    ("llama3.1-8b-full-v5e-16", "v5p-16", 8, ()),
    ("llama3.1-8b-full-v5e-16", "v5p-64", 8, ()),
    ("llama3.1-8b-full-v5e-16", "v5p-256", 8, ()),
    ("llama3.1-8b-full-v5e-16", "2xv5p-64", 8, ("mesh.data=2",)),
    ("llama3.1-8b-full-v5e-16", "4xv5p-64", 8, ("mesh.data=4",)),
    ("llama3.1-70b-full-v5p-128", "v5p-64", 8, ()),
    ("llama3.1-70b-full-v5p-128", "v5p-256", 8, ()),
    ("llama3.1-70b-full-v5p-128", "v5p-512", 8, ()),
    ("llama3.1-70b-full-v5p-128", "2xv5p-128", 8, ("mesh.data=2",)),
    ("llama3.1-70b-full-v5p-128", "4xv5p-128", 8, ("mesh.data=4",)),
    ("llama3.1-405b-full-v5p-512", "v5p-256", 1, ()),
    ("llama3.1-405b-full-v5p-512", "v5p-512", 1, ()),
    ("llama3.1-405b-full-v5p-512", "2xv5p-512", 1, ("mesh.data=2",)),
)
LENGTH = 4096

HEAD = f"""# Scaling on paper

Full training steps with {LENGTH} tokens a row and as many rows a chip whatever the number of chips,
compiled by the TPU compiler without a TPU. `python benchmarks/scaling.py` writes this page.

GB (10^9) and operations are of one chip and one step. Seconds are bounds, what the published peak
rates of a chip and its links allow for the counted work: no step can be faster, none was measured.
Between slices the gradients are summed over the data-centre network, whose rate is that of a host's
share; the last column is the share of a chip's peak that the longest bound leaves.

Over all chips of one v5p slice of 64 or more, the compiler fetches weights by all-reduce, which
sends twice what an all-gather does; over a part of the chips, as on several slices, by all-gather.
`llama-jax fit` says what is sent by kind.

"""
LIMITS = ("compute", "memory", "ici", "dcn")
COLUMNS = (
    "model", "slice", "chips", "rows", "memory GB", "of", "operations", "collectives GB",
    "between slices GB", *(f"{name} s" for name in LIMITS), "bound by",
    "model FLOPs at most",
)  # fmt: skip


def main() -> int:
    chosen = [CASES[int(each)] for each in sys.argv[1:]] or list(CASES)
    lines = []
    for config, slice_name, rows, overrides in chosen:
        wanted = slice_named(slice_name)
        batch = wanted.total_chips * rows // 8
        run = load_run_config(
            ROOT / "configs" / f"{config}.yaml",
            [
                f"mesh.slice={slice_name}",
                f"train.batch_size={batch}",
                f"train.sequence_length={LENGTH}",
                "train.gradient_accumulation_steps=1",
                *overrides,
            ],
        )
        report = fit(run, wanted).to_dict()
        lines.append(line(config.split("-full")[0], report))
        print(lines[-1], flush=True)
    if not sys.argv[1:]:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
        where = f"{platform.machine()}, {os.cpu_count()} cores"
        table = [row(COLUMNS), row(["---"] * len(COLUMNS)), *lines]
        when = datetime.date.today().isoformat()
        PAGE.write_text(HEAD + "\n".join(table) + f"\n\n{when}, {versions}, {where}.\n")
    return 0


def line(model: str, report: dict[str, Any]) -> str:
    sent = report["collectives"]
    cells = [
        model,
        report["slice"],
        report["chips"],
        report["batch_size"],
        f"{report['hbm_bytes_per_chip'] / 1e9:.1f}",
        f"{report['hbm_limit'] / 1e9:.1f}",
        f"{report['flops_per_step'] / report['chips']:.3g}",
    ]
    if sent is None:  # it does not fit, so there is no program to look at
        return row([*cells, *[""] * 6, "does not fit", ""])
    bounds = report["bound_seconds"]
    return row(
        [
            *cells,
            f"{sum(each['bytes_per_chip'] for each in sent.values()) / 1e9:.1f}",
            f"{sum(each['dcn_bytes_per_chip'] for each in sent.values()) / 1e9:.2f}",
            *(f"{bounds[k]:.2f}" if k in bounds else "" for k in LIMITS),
            report["bound_by"],
            f"{100 * report['bound_mfu']:.0f} %",
        ]
    )


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main())
