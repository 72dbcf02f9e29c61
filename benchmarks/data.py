"""How fast the data pipeline makes batches, and how full packing makes them.

usage: python benchmarks/data.py [--step-rate 210] [--seconds 3]
--step-rate: tokens a second that the CPU step of the demo takes, to compare with (its log says).
Rows are synthetic texts and chats of mixed lengths; the tokenizer is SmolLM2's where the demo
extra is installed, else the shipped byte tokenizer.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TEXT = (
    "harbour master wrote down every ship that came in that year what it carried where had been "
    "and how long stayed ledgers tell us which towns grew rich were passed over"
)


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-rate", type=float, default=210.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rows", type=int, default=4000)
    args = parser.parse_args()
    name, tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "rows.jsonl", args.rows)
        results = [
            measure(path, tokenizer, args.seconds, **shape)
            for shape in (
                {"batch_size": 8, "sequence_length": 512, "packing": False, "prefetch": 0},
                {"batch_size": 8, "sequence_length": 512, "packing": True, "prefetch": 0},
                {"batch_size": 8, "sequence_length": 2048, "packing": True, "prefetch": 0},
                {"batch_size": 8, "sequence_length": 2048, "packing": True, "prefetch": 2},
            )
        ]
    slowest = min(result["fed"] for result in results)
    print_table(args, name, results)
    print("RESULT " + json.dumps({"results": results, "times_the_step": slowest / args.step_rate}))


def load_tokenizer() -> tuple[str, Any]:
    from llama_jax.formats.tokenizer import load_tokenizer as read
    from llama_jax.load import load_abstract
    from train.data.files import package_path

    try:
        return "SmolLM2", load_abstract("smollm2-135m").tokenizer
    except (FileNotFoundError, ValueError):
        return "bytes", read(package_path("package:demo/tokenizer"))


def write_rows(path: Path, count: int) -> Path:
    """Half texts, half chats, of lognormal lengths about 60 words."""
    rng, words = np.random.default_rng(0), TEXT.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            size = int(np.clip(rng.lognormal(4.1, 0.9), 3, 1200))
            text = " ".join(rng.choice(words, size))
            row: dict[str, Any] = {"text": text}
            if number % 2:
                half = len(text) // 2
                parts = (("user", text[:half]), ("assistant", text[half:]))
                row = {"messages": [{"role": role, "content": part} for role, part in parts]}
            file.write(json.dumps(row) + "\n")
    return path


def measure(path: Path, tokenizer: Any, seconds: float, **shape: Any) -> dict[str, Any]:
    """prepared: tokens a second from file to samples, once at the start; fed: tokens a second in
    batches, padding left out."""
    from train.config import RunConfig
    from train.data.build import build_data
    from train.data.row_set import read_run_rows

    run = RunConfig.from_dict(
        {
            "model": {"name": "unused"},
            "method": "full",
            "data": {
                "train": str(path),
                "packing": shape["packing"],
                "prefetch": shape["prefetch"],
            },
            "train": {
                "steps": 1,
                "batch_size": shape["batch_size"],
                "sequence_length": shape["sequence_length"],
            },
            "output": "unused",
        }
    )
    begin = time.perf_counter()
    data = build_data(run, *read_run_rows(run), tokenizer)
    prepared = data.train_report.tokens / (time.perf_counter() - begin)
    batches = data.batches(run)
    next(batches)
    tokens, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        tokens += int((next(batches).segment_ids > 0).sum())
    return {
        **shape,
        "prepared": round(prepared),
        "fed": round(tokens / elapsed),
        "fill": round(data.train_report.fill, 4),
    }


def print_table(args: argparse.Namespace, tokenizer: str, results: list[dict[str, Any]]) -> None:
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("grain", "numpy"))
    today = datetime.date.today().isoformat()
    print(
        f"{today}: {platform.machine()}, {os.cpu_count()} cores, {versions}; {args.rows} rows of "
        f"mixed lengths, tokenizer {tokenizer}; the demo's step takes {args.step_rate:g} tokens/s"
    )
    print()
    print("| batch | packing | prefetch | fill | rows to samples | batches | times the step |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['batch_size']} x {r['sequence_length']} | {'yes' if r['packing'] else 'no'} | "
            f"{r['prefetch']} | {r['fill']:.1%} | {r['prepared']:,} tokens/s | "
            f"{r['fed']:,} tokens/s | {r['fed'] / args.step_rate:,.0f} |"
        )


if __name__ == "__main__":
    main()
