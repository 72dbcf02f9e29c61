"""What quantization costs and saves on the real model: one table by one command.

usage: python benchmarks/quantization.py [--steps N] [--folder F]

SmolLM2-135M on a CPU. First the model as it comes under every scheme: which data the scheme needs,
bytes of its weights, tokens/s of greedy generation (batch 4), and the perplexity of the held-out
answers of the demo. Then the same model trained for N steps on the demo's rows, with its products
rounded (method qat, int4 weights) and without (method full, quantized afterwards): how much of the
perplexity that int4 loses training recovers. Each row is printed when it is known. Runs are kept in
the folder, and gone on with.
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

PROMPTS = ("The capital of France is", "Water boils at", "In 1969", "A prime number is")
NEW_TOKENS = 32
# scheme -> the data it needs
SCHEMES = {
    "none": "none",
    "int8": "none",
    "int8-dynamic": "none",
    "int8-static": "unlabelled rows",
    "nf4": "none",
    "int4": "none",
    "int4-dynamic": "none",
    "fp8": "none",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "quantization"))
    parser.add_argument("--only", choices=["schemes", "training"])
    args = parser.parse_args()
    import jax

    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, jax {jax.__version__}\n"
    )
    print("| mode | data needed | MB | tokens/s | perplexity |\n| --- | --- | --- | --- | --- |")
    if args.only != "training":
        of_schemes()
    if args.only != "schemes":
        of_training(args)


def of_schemes() -> None:
    from llama_jax.load import load

    for scheme, data in SCHEMES.items():
        model = load("smollm2-135m")
        show(scheme, data, quantized(model, scheme))


def quantized(model: Any, scheme: str) -> Any:
    import dataclasses

    from llama_jax.commands.quantize import calibration_batches
    from llama_jax.config import Compute
    from llama_jax.weights.calibrate import calibrate
    from llama_jax.weights.quantize import quantize

    if scheme == "none":
        return model
    peaks = None
    if scheme.endswith("static"):
        batches = calibration_batches(model, rows("train"), 2048)
        peaks = calibrate(model.config, model.params, batches, compute=Compute())
    params = quantize(model.config, model.params, scheme=scheme, peaks=peaks)
    return dataclasses.replace(model, params=params)


def of_training(args: argparse.Namespace) -> None:
    import dataclasses

    from llama_jax.load import Model
    from llama_jax.weights.qat_tree import convert_qat
    from train.config import load_run_config
    from train.loop import train

    config = Path(__file__).parent.parent / "configs" / "smollm2-135m-full-cpu.yaml"

    def trained(method: str, *overrides: str) -> Model:
        run = load_run_config(
            config,
            [
                f"method={method}",
                f"train.steps={args.steps}",
                f"train.batch_size={args.batch_size}",
                f"train.sequence_length={args.sequence_length}",
                "data.eval=[]",
                f"output={args.folder / method}",
                *overrides,
            ],
        )
        begin = time.perf_counter()
        result = train(run)
        print(
            f"{method}: {args.steps} steps, {time.perf_counter() - begin:.0f} s, "
            f"loss {result.final_loss:.4f}",
            flush=True,
        )
        return Model(result.config, result.params, result.tokenizer)

    plain = trained("full")
    before = show("trained", f"{args.steps} steps of labelled rows", plain)
    after = show("trained, then int4-dynamic", "the same", quantized(plain, "int4-dynamic"))
    rounded = trained("qat", "qat.bits=4")
    integers = dataclasses.replace(rounded, params=convert_qat(rounded.params))
    qat = show("QAT int4", "the same", integers)
    print(f"QAT recovers {(after - qat) / (after - before):.0%} of what int4 loses")


def rows(name: str) -> list[Any]:
    from train.data.sources import read_rows

    return list(read_rows([f"package:demo/{name}.jsonl"]))


def show(mode: str, data: str, model: Any) -> float:
    from infer.generate import generate
    from llama_jax import tree
    from llama_jax.commands.eval import evaluate
    from llama_jax.config import Compute

    def run() -> int:
        outputs = generate(
            (model.config, model.params, model.tokenizer),
            list(PROMPTS),
            temperature=0.0,
            max_tokens=NEW_TOKENS,
        )
        return sum(len(output.token_ids) for output in outputs)

    run()  # compiles
    begin = time.perf_counter()
    speed = run() / (time.perf_counter() - begin)
    perplexity = evaluate(model, rows("heldout"), compute=Compute(), match=False)["perplexity"]
    size = tree.num_bytes(model.params) / 1e6
    print(f"| {mode} | {data} | {size:.0f} | {speed:.1f} | {perplexity:.4f} |", flush=True)
    return perplexity


if __name__ == "__main__":
    main()
