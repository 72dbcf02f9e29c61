"""The same full training steps by MaxText and by llama-jax, compiled for TPU slices without a TPU.

    python benchmarks/against_maxtext.py --python VENV/bin/python [CASE ...]

VENV is an environment of Python 3.12 with `maxtext[tpu]==0.2.5`, which needs other versions than
this one: both sides run there, so that both meet the same compiler, one after the other. Writes
docs/against-maxtext.md; with cases, numbers from 0 on, only prints their lines. Half an hour on two
cores.

Bytes are of one chip, as the compiler counts them. Seconds are from tracing to the compiled
program: MaxText's between its own two lines, ours with the counting of operations and traffic.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "against-maxtext.md"


@dataclass(frozen=True)
class Case:
    """config: the shipped one that our side starts from; rows: of a chip, each of `length` tokens;
    topology: what MaxText calls the slice, which for v5p counts cores."""

    config: str
    slice: str
    model: str
    topology: str
    chips: int
    rows: int
    length: int


CASES = (
    Case("llama3.1-8b-full-v5e-16", "v5e-16", "llama3.1-8b", "v5e-16", 16, 1, 2048),
    Case("llama3.1-8b-full-v5e-16", "v5e-64", "llama3.1-8b", "v5e-64", 64, 2, 2048),
    Case("llama3.1-8b-full-v5e-16", "v6e-16", "llama3.1-8b", "v6e-16", 16, 2, 4096),
    Case("llama3.1-70b-full-v5p-128", "v5p-64", "llama3.1-70b", "v5p-128", 64, 1, 4096),
    Case("mixtral-8x7b-full-v5p-64", "v5p-64", "mixtral-8x7b", "v5p-128", 64, 2, 4096),
)
COLUMNS = (
    "model", "slice", "rows x tokens a chip", "engine", "arguments GB", "temporaries GB",
    "of MaxText's", "compiled in s",
)  # fmt: skip


def maxtext(case: Case, python: str) -> dict[str, float]:
    """Its own train_compile: full rematerialization, synthetic data, nothing else changed."""
    find = "import importlib.util as i; print(i.find_spec('maxtext').submodule_search_locations[0])"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    base = Path(found.stdout.strip()) / "configs" / "base.yml"
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model_name": case.model,
            "compile_topology": case.topology,
            "compile_topology_num_slices": 1,
            "per_device_batch_size": case.rows,
            "max_target_length": case.length,
            "remat_policy": "full",
            "dataset_type": "synthetic",
            "enable_checkpointing": "false",
            "log_config": "false",
            "base_output_directory": folder,
            "run_name": "compile",
        }
        command = [python, "-u", "-m", "maxtext.trainers.pre_train.train_compile", str(base)]
        process = subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in settings.items())],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        measured, last = {}, ""
        begin = time.perf_counter()
        for line in process.stdout or ():
            last = line.strip() or last
            if line.startswith("Jitting and compiling"):
                begin = time.perf_counter()
            if line.startswith("Jitting and compilation complete"):
                measured["seconds"] = time.perf_counter() - begin
            for kind in ("argument", "temp"):
                if size := re.search(rf"\b{kind}_size_in_bytes=(\d+)", line):
                    measured.setdefault(kind, float(size[1]))
        process.wait()
    if measured.keys() != {"seconds", "argument", "temp"}:
        raise RuntimeError(f"MaxText did not compile {case}: {last}")
    return measured


def ours(case: Case, python: str, gradients: str) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [python, __file__, "--ours", gradients, str(CASES.index(case))],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"llama-jax did not compile {case}: {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def compile_ours(case: Case, gradients: str) -> None:
    """In an interpreter of its own: prints what `ours` reads."""
    from importlib import metadata

    from llama_jax.mesh.slices import slice_named
    from train.config import load_run_config
    from train.fit import fit

    run = load_run_config(
        ROOT / "configs" / f"{case.config}.yaml",
        [
            f"mesh.slice={case.slice}",
            f"train.batch_size={case.rows * case.chips}",
            f"train.sequence_length={case.length}",
            "train.gradient_accumulation_steps=1",
            f"compute.gradient_dtype={gradients}",
        ],
    )
    begin = time.perf_counter()
    report = fit(run, slice_named(case.slice))
    seconds = time.perf_counter() - begin
    memory = report.compiled.memory
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "libtpu", "maxtext")]
    print(
        json.dumps(
            {
                "argument": memory.arguments,
                "temp": memory.temporaries,
                "seconds": seconds,
                "versions": ", ".join(versions),
            }
        )
    )


def lines(case: Case, sides: dict[str, dict[str, Any]]) -> list[str]:
    written = []
    theirs = sides["MaxText"]
    for engine, side in sides.items():
        written.append(
            row(
                [
                    case.model,
                    case.slice,
                    f"{case.rows} x {case.length}",
                    engine,
                    f"{side['argument'] / 1e9:.2f}",
                    f"{side['temp'] / 1e9:.2f}",
                    f"{side['temp'] / theirs['temp']:.2f} x",
                    f"{side['seconds']:.0f}",
                ]
            )
        )
    return written


def row(cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = """# Against MaxText

Full training with float32 weights and moments, bfloat16 products and full rematerialization, the
whole step compiled by the TPU compiler without a TPU, both engines by the same one. A v5p slice is
named by its chips, where MaxText counts cores. `python benchmarks/against_maxtext.py` writes this
page.

GB (10^9) are of one chip. Nothing here says how fast a step is. Gradients in bfloat16 are
`compute.gradient_dtype: bfloat16`; the others are kept in float32 on both sides.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="an interpreter that has maxtext[tpu]")
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    parser.add_argument("cases", type=int, nargs="*")
    arguments = parser.parse_args()
    if arguments.ours is not None:
        compile_ours(CASES[arguments.cases[0]], arguments.ours)
        return 0
    if arguments.python is None:
        parser.error("--python is needed: an interpreter that has maxtext[tpu]==0.2.5")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["LLAMA_JAX_CACHE_DIR"] = "off"
    table, versions = [row(COLUMNS), row(["---"] * len(COLUMNS))], ""
    for case in [CASES[each] for each in arguments.cases] or CASES:
        sides = {
            "llama-jax": ours(case, arguments.python, "float32"),
            "llama-jax, gradients in bfloat16": ours(case, arguments.python, "bfloat16"),
            "MaxText": maxtext(case, arguments.python),
        }
        versions = sides["llama-jax"]["versions"]
        written = lines(case, sides)
        print(*written, sep="\n", flush=True)
        table += written
    where = f"{platform.machine()}, {os.cpu_count()} cores"
    end = f"{datetime.date.today().isoformat()}, {versions}, {where}."
    print(end)
    if not arguments.cases:
        PAGE.write_text(HEAD + "\n".join(table) + f"\n\n{end}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
