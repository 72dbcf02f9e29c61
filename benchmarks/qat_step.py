"""The cost of a step of quantization-aware training, as a ratio to the plain step, on a CPU.

usage: python benchmarks/qat_step.py [--layers 4] [--steps 5]

Layers of SmolLM2-135M's width, random weights, 4 x 128 tokens, all weights trained. The steps of
the methods take turns, so that what else the machine does falls on all of them alike.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

VARIANTS = {
    "full": {"method": "full"},
    "int8": {"method": "qat", "qat": {"bits": 8}},
    "int4": {"method": "qat", "qat": {"bits": 4}},
    "int8, quantized backward": {"method": "qat", "qat": {"bits": 8, "backward": "quantized"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    import jax

    steps = {name: prepare(changes, args.layers) for name, changes in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.steps):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, jax {jax.__version__}"
    )
    plain = statistics.median(seconds["full"])
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{name:26} {median:7.3f} s  {median / plain:5.2f}")


def prepare(changes: dict[str, Any], layers: int) -> Any:
    import jax
    import numpy as np

    from llama_jax.model.losses import Batch
    from train.config import RunConfig
    from train.setup import init_random, make_setup, make_state, open_mesh
    from train.start import read_shape

    run = RunConfig.from_dict(
        {
            "model": {
                "name": "smollm2-135m",
                "init": "random",
                "tokenizer": "unused",
                "dtype": "float32",
                "overrides": {"num_hidden_layers": layers, "vocab_size": 4096},
            },
            "data": {"train": "unused.jsonl"},
            "mesh": {"cpu_devices": 1},
            "train": {"steps": 100, "batch_size": 4, "sequence_length": 128},
            "output": "unused",
            **changes,
        }
    )
    setup = make_setup(run, *read_shape(run), open_mesh(run.mesh))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4096, (4, 128), dtype=np.int32)
    positions = np.broadcast_to(np.arange(128, dtype=np.int32), (4, 128))
    ones = np.ones((4, 128), np.int32)
    batch = setup.place(Batch(tokens, tokens, ones.astype(np.float32), ones, positions))
    with jax.set_mesh(setup.mesh):
        state = make_state(setup, init_random(setup))
        compiled = setup.step.lower(state, batch).compile()

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)

    step()
    return step


if __name__ == "__main__":
    main()
