"""How much memory importing a Hugging Face folder takes beyond the model's own bytes.

Writes a many-shard model of random weights to a temporary folder, loads it in a fresh process and
prints that process's peak resident memory less the bytes of its parameters:

    python benchmarks/import_memory.py [--gigabytes 4] [--dtype bfloat16] [--load-dtype float32]

The peak is the kernel's high-water mark (VmHWM), which counts the mapped pages of the files too.
The measured processes see one CPU device. Linux only.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from llama_jax.config import FLOAT_DTYPES, ModelConfig
from llama_jax.formats.hf import load_hf
from llama_jax.formats.hf_config import to_hf
from llama_jax.formats.safetensors import TensorSpec, write_sharded
from llama_jax.tree import num_bytes
from llama_jax.weights.table import num_parameters, weight_table

MIB = 2**20
SHARD_BYTES = 200 * 10**6


def make_config(gigabytes: float, dtype: str) -> ModelConfig:
    """A Llama of about that size with the vocabulary of Llama 3, whose embedding is one tensor."""
    base = ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        dtype=dtype,
    )
    layer = num_parameters(base.replace(num_hidden_layers=2)) - num_parameters(base)
    wanted = gigabytes * 1e9 / np.dtype(jax.numpy.dtype(dtype)).itemsize
    layers = round((wanted - num_parameters(base)) / layer) + 1
    return base.replace(num_hidden_layers=max(layers, 1))


def write_model(folder: Path, config: ModelConfig) -> int:
    """Random weights, one tensor in memory at a time; returns the number of shards."""
    dtype = np.dtype(jax.numpy.dtype(config.dtype))
    specs = [
        TensorSpec(name, dtype, row.shape[len(at) :])
        for row in weight_table(config).values()
        for name, at in row.hf_names()
    ]
    rng = np.random.default_rng(0)
    block = rng.normal(0, 0.02, 1 << 20).astype(dtype)

    def fetch(spec: TensorSpec) -> np.ndarray:
        return np.resize(np.roll(block, int(rng.integers(1 << 20))), spec.shape)

    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    return len(write_sharded(folder, specs, fetch, max_shard_bytes=SHARD_BYTES)) - 1


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(folder: str, dtype: str | None) -> None:
    jax.block_until_ready(jax.device_put(np.zeros(8, np.float32)))  # the backend's own memory
    before = resident("VmRSS")
    _, params = load_hf(folder, dtype=dtype)
    print(json.dumps({"before": before, "model": num_bytes(params), "peak": resident("VmHWM")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--dtype", default="bfloat16", choices=FLOAT_DTYPES)
    parser.add_argument("--load-dtype", choices=FLOAT_DTYPES, help="convert while loading")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.load_dtype)
        return
    with tempfile.TemporaryDirectory() as name:
        config = make_config(arguments.gigabytes, arguments.dtype)
        num_shards = write_model(Path(name), config)
        command = [sys.executable, __file__, "--measure", name]
        if arguments.load_dtype:
            command += ["--load-dtype", arguments.load_dtype]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        result = json.loads(run.stdout)
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, jax {jax.__version__}"
    )
    print(
        f"{config.num_hidden_layers} layers, {num_shards} shards, stored {arguments.dtype}, "
        f"loaded {arguments.load_dtype or arguments.dtype}"
    )
    print(f"model                      {result['model'] / MIB:9.1f} MiB")
    print(f"peak resident              {result['peak'] / MIB:9.1f} MiB")
    print(f"peak less model            {(result['peak'] - result['model']) / MIB:9.1f} MiB")
    print(f"  of it before the import  {result['before'] / MIB:9.1f} MiB")


if __name__ == "__main__":
    main()
