"""What pruning costs the real model, and what distillation from the original brings back.

usage: python benchmarks/recovery.py --folder F [--steps 60]

The recipe of docs/pruning.md, by its own commands: SmolLM2-135M-Instruct is pruned in several ways,
distilled from itself on the topics of Python's language reference (an eighth held out, the rows of
`distillation.py`), and exported; the held-out perplexity is that of the exported folders.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from distillation import write_rows

MODEL = "smollm2-135m"
CONFIG = Path(__file__).parent.parent / "configs" / "smollm2-135m-recover-distill-cpu.yaml"
WAYS: dict[str, tuple[list[str], list[str]]] = {
    "half of every matrix zero (wanda)": (
        ["--sparsity", "0.5", "--method", "wanda"],
        [],
    ),
    "24 of 30 layers": (["--layers", "24"], ["model.keep_zeros=false"]),
}


def command(*arguments: str) -> Any:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.cli", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1]) if "--json" in arguments else None


def perplexity(model: str, folder: Path) -> float:
    rows = str(folder / "heldout.jsonl")
    shape = ("--sequence-length", "256", "--batch-size", "4")
    return float(command("eval", model, "--data", rows, *shape, "--json")["perplexity"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for rows, runs and models")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.folder)
    rows = str(args.folder / "train.jsonl")
    print(f"{datetime.date.today()}: {platform.machine()}, {os.cpu_count()} cores")
    print(f"{args.steps} steps of 4 x 256 tokens; held-out perplexity", flush=True)
    print(f"as it is: {perplexity(MODEL, args.folder):.1f}", flush=True)
    for number, (name, (flags, overrides)) in enumerate(WAYS.items()):
        pruned, run, out = (
            str(args.folder / f"{kind}-{number}") for kind in ("pruned", "run", "out")
        )
        calibration = ("--calibration", rows, "--calibration-rows", "16")
        command("prune", MODEL, pruned, *flags, *calibration, "--overwrite")
        before = perplexity(pruned, args.folder)
        begin = time.monotonic()
        own = [f"model.name={pruned}", f"data.train={rows}", f"output={run}", *overrides]
        command("train", str(CONFIG), *own, f"train.steps={args.steps}")
        minutes = (time.monotonic() - begin) / 60
        command("export", run, out, "--format", "hf", "--overwrite")
        after = perplexity(out, args.folder)
        print(f"{name}: {before:.1f}, recovered {after:.1f} in {minutes:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
