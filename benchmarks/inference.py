"""Prefill and decode of one engine: one RESULT line a batch size.

usage: python benchmarks/inference.py ENGINE FOLDER [--batch 8] [--length 128] [--new 128]
ENGINE: llama-jax, transformers, or llama.cpp (LLAMACPP_BIN names the folder of
llama-batched-bench). FOLDER is what `workload.py FOLDER` made.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from workload import emit, median, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["llama-jax", "transformers", "llama.cpp"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if args.engine == "llama.cpp":
        llama_cpp(args)
        return
    make = llama_jax if args.engine == "llama-jax" else transformers
    version, run = make(args)
    run(2)  # compiles, touches the weights
    run(args.new)
    first = median([timed(run, 1) for _ in range(args.repeats)])
    whole = median([timed(run, args.new) for _ in range(args.repeats)])
    emit(
        engine=args.engine,
        version=version,
        batch=args.batch,
        length=args.length,
        new=args.new,
        prefill_tokens_per_second=round(args.batch * args.length / first, 1),
        decode_tokens_per_second=round(args.batch * (args.new - 1) / (whole - first), 1),
        first_token_ms=round(first * 1e3, 1),
    )


def timed(run: Callable[[int], None], new: int) -> float:
    begin = time.perf_counter()
    run(new)
    return time.perf_counter() - begin


def llama_jax(args: argparse.Namespace) -> tuple[str, Callable[[int], None]]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import dataclasses

    import llama_jax as lj
    from infer.generate import Generator
    from infer.params import SamplingParams

    model = lj.load(args.folder / "hf", dtype="float32")
    # Every row runs to the end: no token ends a text.
    config = dataclasses.replace(model.config, eos_token_id=())
    generator = Generator(config, model.params)
    ids = prompts(args.folder / "hf", args.batch, args.length)

    def run(new: int) -> None:
        outputs = generator.generate(ids, SamplingParams(temperature=0, max_tokens=new))
        assert all(len(output.token_ids) == new for output in outputs)

    return lj.__version__, run


def transformers(args: argparse.Namespace) -> tuple[str, Callable[[int], None]]:
    import torch
    from transformers import AutoModelForCausalLM, __version__

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(args.folder / "hf", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 2
    ids = torch.tensor(prompts(args.folder / "hf", args.batch, args.length))

    def run(new: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
            )
        assert out.shape[1] == args.length + new

    return __version__, run


def llama_cpp(args: argparse.Namespace) -> None:
    binary = Path(os.environ["LLAMACPP_BIN"]) / "llama-batched-bench"
    context = args.batch * (args.length + args.new) + 64
    command = [str(binary), "-m", str(args.folder / "model-f32.gguf"), "-c", str(context)]
    command += ["-b", "2048", "-ub", "512", "-npp", str(args.length), "-ntg", str(args.new)]
    command += ["-npl", str(args.batch), "-t", str(os.cpu_count()), "-tb", str(os.cpu_count())]
    command += ["--output-format", "jsonl"]
    rows = []
    for _ in range(args.repeats):
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    emit(
        engine="llama.cpp",
        version="",
        batch=args.batch,
        length=args.length,
        new=args.new,
        prefill_tokens_per_second=round(median([row["speed_pp"] for row in rows]), 1),
        decode_tokens_per_second=round(median([row["speed_tg"] for row in rows]), 1),
        first_token_ms=round(median([row["t_pp"] for row in rows]) * 1e3, 1),
    )


if __name__ == "__main__":
    main()
