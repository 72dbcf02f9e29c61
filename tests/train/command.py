"""The real training command in processes of its own: started, killed, waited for."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

from tests.train.test_loop import TINY
from tests.train.tiny_data import TOKENIZER, chat_row, write_rows

ROOT = Path(__file__).parents[2]

Process = subprocess.Popen[str]


def write_run(folder: Path, **changes) -> Path:
    """A run config of a tiny model, and its rows; changes are named section__field."""
    rows = [chat_row(f"what is {n}?", f"it is {n * n}") for n in range(30)]
    values = {
        "model": {
            "name": "smollm2-135m",
            "init": "random",
            "tokenizer": TOKENIZER,
            "dtype": "float32",
            "overrides": TINY,
        },
        "method": "lora",
        "data": {
            "train": [write_rows(folder / "rows.jsonl", rows)],
            "eval_fraction": 0.2,
            "packing": True,
        },
        "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 2},
        "mesh": {"fsdp": 4, "cpu_devices": 4},
        "train": {"steps": 6, "batch_size": 4, "sequence_length": 96},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[section] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path, *arguments: str, cache: Path, count: int = 1) -> list[Process]:
    """`llama-jax train` in `count` processes that make up one program. cache: of compiled programs,
    which makes the second start a matter of seconds."""
    return start_each([config] * count, *arguments, cache=cache)


def start_each(configs: list[Path], *arguments: str, cache: Path) -> list[Process]:
    """One process for each config, which together make up one program."""
    environment = {
        **os.environ,
        "LLAMA_JAX_CACHE_DIR": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    address, count = f"127.0.0.1:{free_port()}", len(configs)
    flags = ["--coordinator-address", address, "--process-count", str(count), "--process-id"]
    started = []
    for number, config in enumerate(configs):
        command = [sys.executable, "-m", "llama_jax.cli", "train", str(config), *arguments]
        own = [*flags, str(number)] if count > 1 else []
        started.append(_open([*command, *own], environment))
    return started


def _open(command: list[str], environment: dict[str, str]) -> Process:
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def finish(processes: list[Process], *, code: int = 0, timeout: float = 240) -> list[str]:
    """Waits; the standard errors of all, which must have ended with `code`."""
    try:
        outputs = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    codes = [process.returncode for process in processes]
    assert codes == [code] * len(processes), (codes, outputs)
    return outputs
