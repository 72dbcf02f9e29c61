"""From a new process to its first token, and the start of the package and of the command.

usage: python benchmarks/cold_start.py FOLDER

Our start runs several times with one compilation cache; the first does not count. The peer is
transformers, which has nothing to compile.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workload import emit

PROGRAM = """
import sys, time
from llama_jax.commands.startup import start_jax
start_jax()
import llama_jax as lj
model = lj.load(sys.argv[1])
first = []
def show(piece):
    if not first:
        first.append(time.time())
        print(first[0], flush=True)
lj.generate(model, ["The capital of France is"], temperature=0, max_tokens=16, stream=show)
"""

PEER = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = AutoTokenizer.from_pretrained(sys.argv[1])("The capital of France is", return_tensors="pt")
model.generate(**ids, max_new_tokens=1, do_sample=False)
print(time.time())
"""


def main() -> None:
    folder = Path(sys.argv[1]) / "hf"
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LLAMA_JAX_CACHE_DIR": cache}
        seconds: dict[str, list[float]] = {PROGRAM: [], PEER: []}
        for _ in range(4):
            for program, found in seconds.items():
                begin = time.time()
                out = subprocess.run(
                    [sys.executable, "-c", program, str(folder)],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                found.append(round(float(out.split()[0]) - begin, 2))
    command = Path(sys.executable).parent / "llama-jax"
    emit(
        first_start_seconds=seconds[PROGRAM][0],
        later_starts_seconds=seconds[PROGRAM][1:],
        transformers_seconds=seconds[PEER][1:],
        import_seconds=_fastest([sys.executable, "-c", "import llama_jax"]),
        help_seconds=_fastest([str(command), "--help"]),
    )


def _fastest(command: list[str]) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return round(min(times), 2)


if __name__ == "__main__":
    main()
