"""Compiles every shipped config that names a TPU slice, and writes docs/proven-configs.md.

usage: python benchmarks/prove_configs.py [NAME ...]

With names, of `configs/` or `configs/serve/`, only those are compiled and their lines written anew.
Needs the `tpu` extra, no TPU; some fifteen minutes on two cores. Ends with 1 when a config does not
fit the slice it names.
"""

import datetime
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from infer.fit import trial
from infer.fit.serve_fit import ServeFit
from infer.server.settings_reader import read_settings
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


SERVE_COLUMNS = (
    "config", "weights", "keys and values", "slice", "rows x tokens", "cache tokens", "together",
    "limit", "most cache tokens", "steps", "bound s", "by", "new tokens/s at most", "compiled in s",
)  # fmt: skip

SERVE_HEAD = """
## Servers

Every serve config, all steps of its engine compiled for its slice (`llama-jax fit --serve`): pieces
of prompts, tokens of so many rows, sampling. Rows x tokens are choices computed together and what
each may hold of the cache when all are there; `together` is weights, cache, all programs and what
the most demanding of them needs, GiB of one chip. The bound is of a step of all rows, each as long
as the cache lets it be.

"""


def main() -> int:
    shipped = names_in(ROOT / "configs")
    served = names_in(ROOT / "configs" / "serve")
    lines = kept_lines() if sys.argv[1:] else {}
    fits = True
    for name in sys.argv[1:] or [*shipped, *served]:
        prove = prove_server if name in served else prove_run
        found = prove(name)
        if found is None:
            continue
        lines[name], fitted = found
        fits &= fitted
        print(lines[name], flush=True)
    tables = [[lines[name] for name in names if name in lines] for names in (shipped, served)]
    PAGE.write_text(page(*tables))
    return 0 if fits else 1


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.yaml"))


def prove_run(name: str) -> tuple[str, bool] | None:
    run = load_run_config(ROOT / "configs" / name)
    if run.mesh.slice is None:
        return None
    result = fit(run, slice_named(run.mesh.slice))
    return line(name, result), result.compiled.fits


def prove_server(name: str) -> tuple[str, bool]:
    settings = read_settings({}, config=ROOT / "configs" / "serve" / name, environment={})
    assert settings.slice is not None
    result = trial.fit(settings, slice_named(settings.slice), lambda _: None)
    return serve_line(name, result), result.fits


def kept_lines() -> dict[str, str]:
    """The page's lines, by config."""
    cells = [(each.split("`"), each) for each in PAGE.read_text().splitlines()]
    return {parts[1]: each for parts, each in cells if each.startswith("| `")}


def page(lines: list[str], served: list[str]) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    when = datetime.date.today().isoformat()
    where = f"{platform.machine()}, {os.cpu_count()} cores"
    table = [row(COLUMNS), row(["---"] * len(COLUMNS)), *lines]
    servers = [row(SERVE_COLUMNS), row(["---"] * len(SERVE_COLUMNS)), *served]
    parts = HEAD, "\n".join(table), "\n", SERVE_HEAD, "\n".join(servers)
    return "".join(parts) + f"\n\n{when}, {versions}, {where}.\n"


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


def serve_line(name: str, result: ServeFit) -> str:
    report = result.to_dict()
    return row(
        [
            f"`{name}`",
            weights_of(result),
            report["cache_dtype"],
            report["slice"],
            f"{report['max_slots']} x {report['row_tokens']}",
            report["cache_tokens"],
            f"{report['hbm_bytes_per_chip'] / 2**30:.2f}",
            f"{report['hbm_limit'] / 2**30:.2f}",
            report["largest_cache_tokens"],
            len(report["steps"]),
            f"{max(report['bound_seconds'].values()):.3g}",
            report["bound_by"],
            f"{report['bound_tokens_per_second']:.0f}",
            f"{report['compile_seconds']:.0f}",
        ]
    )


def weights_of(result: ServeFit) -> str:
    report, options = result.to_dict(), result.options
    kind = report["quantization"] or report["dtype"]
    if not options.max_adapters:
        return str(kind)
    return f"{kind}, {options.max_adapters} adapters of rank {options.max_lora_rank}"


def row(cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main())
