"""How much host memory quantizing a Hugging Face folder takes, piece by piece.

Writes a many-shard model of random weights to a temporary folder, runs `llama-jax quantize` on it
in a fresh process and prints that process's peak resident memory (VmHWM, mapped pages of files
included) beside the bound, three times the largest tensor and 500 MiB:

    python benchmarks/quantize_memory.py [--gigabytes 4] [--scheme int8]

Ends with 1 beyond the bound. Linux only.
"""

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from import_memory import MIB, make_config, resident, write_model

from llama_jax.weights.table import weight_table


def measure(folder: str, out: str, scheme: str) -> None:
    from llama_jax.cli import main as cli

    code = cli(["quantize", folder, out, "--scheme", scheme, "--json"])
    print(resident("VmHWM"), file=sys.stderr)
    sys.exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.scheme)
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name, "model"), Path(name, "quantized")
        source.mkdir()
        config = make_config(arguments.gigabytes, arguments.dtype)
        num_shards = write_model(source, config)
        command = [sys.executable, __file__, "--scheme", arguments.scheme]
        command += ["--measure", str(source), str(out)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        start = time.perf_counter()
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        report, peak = json.loads(run.stdout), int(run.stderr.split()[-1])
    itemsize = np.dtype(jax.numpy.dtype(arguments.dtype)).itemsize
    largest = max(
        math.prod(row.shape[row.hf_name.count("{") :])  # what is not stacked
        for row in weight_table(config).values()
    )
    bound = 3 * largest * itemsize + 500 * MIB
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, jax {jax.__version__}"
    )
    print(
        f"{arguments.scheme}, {config.num_hidden_layers} layers, {num_shards} shards, "
        f"{seconds:.0f} s"
    )
    print(f"before          {report['bytes_before'] / MIB:9.1f} MiB")
    print(f"after           {report['bytes'] / MIB:9.1f} MiB")
    print(f"largest tensor  {largest * itemsize / MIB:9.1f} MiB")
    print(f"bound           {bound / MIB:9.1f} MiB")
    print(f"peak resident   {peak / MIB:9.1f} MiB")
    return 0 if peak <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
