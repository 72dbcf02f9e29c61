"""Compiles the LoRA step of Llama-3.1-8B for 16 v5e chips on this machine, without a TPU.

usage: python benchmarks/compile_for_tpu.py [--slice v5e-16] [--preset llama3.1-8b]

Prints the compile time and the bytes per chip that the TPU compiler reports. Needs the `tpu`
extra. Limits to meet: 35 s and 3.5 GB a chip.
"""

import argparse
import datetime
import json
import os
import platform
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from llama_jax.mesh.sharding import make_mesh
from llama_jax.mesh.slices import slice_devices
from llama_jax.presets import presets
from llama_jax.weights.table import abstract_params
from train.config import RunConfig
from train.setup import make_setup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slice", default="v5e-16")
    parser.add_argument("--preset", default="llama3.1-8b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=2048)
    arguments = parser.parse_args()
    config = presets[arguments.preset]
    run = RunConfig.from_dict(
        {
            "model": {"name": arguments.preset, "init": "random", "tokenizer": "unused"},
            "method": "lora",
            "data": {"train": "unused.jsonl"},
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "mesh": {"fsdp": -1},
            "compute": {"dtype": "bfloat16", "remat": "full", "attention": "splash"},
            "train": {
                "steps": 1,
                "batch_size": arguments.batch,
                "sequence_length": arguments.sequence,
            },
            "output": "unused",
        }
    )
    mesh = make_mesh(run.mesh.sizes(), devices=slice_devices(arguments.slice))
    begin = time.perf_counter()
    setup = make_setup(run, config, abstract_params(config), mesh)
    with jax.set_mesh(mesh):
        lowered = setup.step.lower(setup.abstract, setup.batch_struct(arguments.batch))
        traced = time.perf_counter() - begin
        compiled = lowered.compile()
    total = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    print(
        json.dumps(
            {
                "what": f"{arguments.preset} LoRA rank 16, remat full, bfloat16",
                "slice": arguments.slice,
                "batch": arguments.batch,
                "sequence": arguments.sequence,
                "trace_seconds": round(traced, 1),
                "compile_seconds": round(total, 1),
                "argument_gb": round(memory.argument_size_in_bytes / 1e9, 3),
                "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 3),
                "output_gb": round(memory.output_size_in_bytes / 1e9, 3),
                "aliased_gb": round(memory.alias_size_in_bytes / 1e9, 3),
                "jax": jax.__version__,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "date": datetime.date.today().isoformat(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
