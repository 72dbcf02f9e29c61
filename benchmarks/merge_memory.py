"""Peak host memory of a merge: a generated checkpoint of many shards, in a process of its own.

    python benchmarks/merge_memory.py --gigabytes 4 --folder /tmp/merge

Writes two models of random bfloat16 weights in shards of 100 MB, merges them with each method
given, and compares the peak that `llama-jax merge --json` reports with the bound: three times the
largest tensor and 500 MiB. Exits with 1 when it is exceeded. Result and settings: docs/merging.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml

from llama_jax.formats.hf import in_file_order, write_descriptions
from llama_jax.formats.safetensors import TensorSpec, write_sharded
from llama_jax.presets import presets
from llama_jax.weights.table import num_parameters

RECIPES = {
    "chat_vector": {"ratio": 0.5},
    "linear": {},
    "slerp": {"t": 0.5},
    "ties": {"density": 0.2},
    "dare": {"density": 0.2},
}


def write_model(folder: Path, gigabytes: float, seed: int) -> tuple[int, int]:
    """Random weights of Llama-3.2-1B's width; returns (bytes, bytes of the largest tensor)."""
    config = presets["llama3.2-1b"].replace(dtype="bfloat16")
    one = config.replace(num_hidden_layers=1)
    layer = num_parameters(config.replace(num_hidden_layers=2)) - num_parameters(one)
    layers = 1 + round((gigabytes * 1e9 / 2 - num_parameters(one)) / layer)
    config = config.replace(num_hidden_layers=layers)
    kind = np.dtype(ml_dtypes.bfloat16)
    specs = [
        TensorSpec(name, kind, row.shape[len(at) :]) for row, name, at in in_file_order(config)
    ]
    rng = np.random.default_rng(seed)

    def draw(spec: TensorSpec) -> np.ndarray:
        # Signs and mantissas at random, sizes between 2**-7 and 2**-5.
        bits = rng.integers(0, 1 << 16, spec.shape, np.uint16)
        return ((bits & 0x80FF) | 0x3C00).view(kind)

    folder.mkdir(parents=True)
    write_descriptions(folder, config, {"bfloat16"})
    write_sharded(folder, specs, draw, max_shard_bytes=100_000_000, metadata={"format": "pt"})
    return sum(spec.num_bytes for spec in specs), max(spec.num_bytes for spec in specs)


def recipe(method: str, models: list[str]) -> dict:
    names = {"chat_vector": ("base", "chat"), "linear": (), "slerp": ()}.get(method, ("base",))
    values = {"method": method, **RECIPES[method]}
    values |= dict(zip(names, models, strict=False))
    if method == "chat_vector":
        values["target"] = models[0]
    else:
        values["models"] = models[len(names) :]
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument(
        "--folder", type=Path, required=True, help="for scratch; emptied at the end"
    )
    parser.add_argument("--methods", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    models = [args.folder / "one", args.folder / "two"]
    sizes = [write_model(model, args.gigabytes, seed) for seed, model in enumerate(models)]
    total, largest = sizes[0]
    bound = 3 * largest + 500 * 2**20
    shards = len(list(models[0].glob("*.safetensors")))
    print(f"{total / 1e9:.2f} GB in {shards} shards, largest tensor {largest / 2**20:.0f} MiB")
    exceeded = False
    for method in args.methods:
        path, out = args.folder / "recipe.yaml", args.folder / "out"
        path.write_text(yaml.safe_dump(recipe(method, [str(model) for model in models])))
        command = [sys.executable, "-m", "llama_jax.cli", "merge", str(path), str(out), "--json"]
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout)
        peak = report["peak_host_bytes"]
        exceeded |= peak > bound
        print(
            f"{method}: peak {peak / 2**20:.0f} MiB of {bound / 2**20:.0f}, "
            f"{time.monotonic() - begin:.0f} s, {report['bytes'] / 1e9:.2f} GB written"
        )
        shutil.rmtree(out)
    for model in models:
        shutil.rmtree(model)
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main())
