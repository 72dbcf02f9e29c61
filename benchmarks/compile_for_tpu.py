"""Compiles the LoRA step of Llama-3.1-8B for 16 v5e chips on this machine, without a TPU.

usage: python benchmarks/compile_for_tpu.py [--slice v5e-16] [--preset llama3.1-8b] [--full]

Prints the time from nothing to the compiled program and the bytes per chip that the TPU compiler
reports. Needs the `tpu` extra. Limits to meet for LoRA: 35 s and 3.5 GB a chip.
"""

import argparse
import datetime
import json
import os
import platform
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from llama_jax.mesh.slices import slice_named
from train.config import RunConfig
from train.fit import fit

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def run_config(arguments: argparse.Namespace) -> RunConfig:
    sections: dict[str, Any] = {
        "model": {"name": arguments.preset, "init": "random", "tokenizer": "unused"},
        "method": "full" if arguments.full else "lora",
        "data": {"train": "unused.jsonl"},
        "mesh": {"fsdp": -1},
        "compute": {"dtype": "bfloat16", "remat": "full", "attention": "splash"},
        "train": {
            "steps": 1,
            "batch_size": arguments.batch,
            "sequence_length": arguments.sequence,
        },
        "output": "unused",
    }
    if arguments.full:
        sections["compute"]["param_dtype"] = "float32"
    else:
        sections["lora"] = LORA
    return RunConfig.from_dict(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slice", default="v5e-16")
    parser.add_argument("--preset", default="llama3.1-8b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--full", action="store_true", help="every weight in float32, not LoRA")
    arguments = parser.parse_args()
    run = run_config(arguments)
    begin = time.perf_counter()
    report = fit(run, slice_named(arguments.slice)).to_dict()
    seconds = time.perf_counter() - begin
    kinds = ("arguments", "temporaries", "outputs", "code")
    print(
        json.dumps(
            {
                "what": f"{arguments.preset}, {run.method}, remat full, bfloat16",
                "slice": report["slice"],
                "batch": arguments.batch,
                "sequence": arguments.sequence,
                "seconds": round(seconds, 1),
                **{
                    f"{kind}_gb": round(report[f"{kind}_bytes_per_chip"] / 1e9, 3) for kind in kinds
                },
                "memory_traffic_gb": round(report["bytes_accessed_per_chip"] / 1e9),
                "sent_gb": {
                    kind: round(sent["bytes_per_chip"] / 1e9, 2)
                    for kind, sent in report["collectives"].items()
                },
                "jax": jax.__version__,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "date": datetime.date.today().isoformat(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
