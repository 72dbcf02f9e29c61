"""Runs the engines in turn (A B A B …) and prints one table with ratios, machine and date.

usage: python benchmarks/run.py [inference] [training] [--rounds 3] [--out docs/benchmarks.md]
llama.cpp takes part where LLAMACPP_BIN names the folder of its llama-batched-bench.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from workload import median, prepare

HERE = Path(__file__).parent
Command = list[str]
Results = dict[str, list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=["inference", "training", "once", []])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "smollm2-f32")
    parser.add_argument("--out", type=Path, help="also append the tables to this file")
    args = parser.parse_args()
    prepare(args.folder)
    text = [heading()]
    chosen = args.what or ["once", "inference", "training"]
    if "once" in chosen:
        text.append(once(args.folder))
    if "inference" in chosen:
        text.append(inference(args.folder, args.rounds))
    if "training" in chosen:
        text.append(training(args.folder, args.rounds))
    print("\n".join(text))
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write("\n".join(text) + "\n")


def heading() -> str:
    names = ("jax", "flax", "transformers", "peft", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    today = datetime.date.today().isoformat()
    return f"\n{today}: {platform.machine()}, {os.cpu_count()} cores, {versions}\n"


def measure(command: Command) -> dict[str, Any]:
    out = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, cwd=HERE
    ).stdout
    line = next(line for line in out.splitlines() if line.startswith("RESULT "))
    print(line, file=sys.stderr, flush=True)
    return json.loads(line.removeprefix("RESULT "))


def in_turn(commands: dict[str, Command], rounds: int) -> Results:
    results: Results = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            results[name].append(measure(command))
    return results


def middle(rows: list[dict[str, Any]], key: str) -> float:
    return median([row[key] for row in rows])


def once(folder: Path) -> str:
    exact = measure(["fidelity.py", str(folder)])
    start = measure(["cold_start.py", str(folder)])
    gaps = ", ".join(f"{gap:.1e}" for gap in exact["gaps_where_texts_part"])
    return "\n".join(
        [
            "| what | measured |",
            "|---|---|",
            f"| largest logit difference to transformers, {exact['tokens']} tokens, float32 "
            f"| {exact['largest_logit_difference']:.1e} |",
            f"| greedy texts identical to transformers | {exact['identical_greedy_texts']} |",
            f"| logits that decide where others part, apart by (in float64) | {gaps or 'none'} |",
            f"| new process to first token, first start | {start['first_start_seconds']} s |",
            f"| later starts | {start['later_starts_seconds']} s |",
            f"| transformers, new process to first token | {start['transformers_seconds']} s |",
            f"| `import llama_jax` | {start['import_seconds']} s |",
            f"| `llama-jax --help` | {start['help_seconds']} s |",
            "",
        ]
    )


def inference(folder: Path, rounds: int) -> str:
    engines = ["llama-jax", "transformers"]
    if "LLAMACPP_BIN" in os.environ:
        engines.append("llama.cpp")
    lines = [
        f"SmolLM2-135M, float32, 128 + 128 tokens, greedy; medians of {rounds} rounds.",
        "",
        "| batch | engine | decode tokens/s | ours is | prefill tokens/s | ours is |",
        "|---|---|---|---|---|---|",
    ]
    keys = ("decode_tokens_per_second", "prefill_tokens_per_second")
    for batch in (1, 8, 32):
        commands = {
            engine: ["inference.py", engine, str(folder), "--batch", str(batch)]
            for engine in engines
        }
        results = in_turn(commands, rounds)
        ours = {key: middle(results["llama-jax"], key) for key in keys}
        for engine in engines:
            cells = []
            for key in keys:
                value = middle(results[engine], key)
                cells += [f"{value:.1f}", f"{ours[key] / value:.2f} x"]
            lines.append(f"| {batch} | {engine} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def training(folder: Path, rounds: int) -> str:
    lines = [
        f"SmolLM2-135M, float32, 4 x 256 tokens a step; medians of {rounds} rounds. peak: of the "
        f"process.",
        "",
        "| training | engine | tokens/s | ours is | peak MiB | ours is | first losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, remat in (("lora", True), ("lora", False), ("full", False)):
        options = ["--mode", mode, *(["--remat"] if remat else [])]
        commands = {
            engine: ["training.py", engine, str(folder), *options]
            for engine in ("llama-jax", "peft")
        }
        results = in_turn(commands, rounds)
        name = mode + (", recomputing" if remat else "")
        ours = results["llama-jax"]
        for engine, rows in results.items():
            speed, peak = middle(rows, "tokens_per_second"), middle(rows, "peak_mib")
            lines.append(
                f"| {name} | {engine} | {speed:.1f} "
                f"| {middle(ours, 'tokens_per_second') / speed:.2f} x | {peak:.0f} "
                f"| {middle(ours, 'peak_mib') / peak:.2f} x | {rows[0]['losses'][:3]} |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
