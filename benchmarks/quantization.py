"""What quantization costs and saves on the real model: one table by one command.

usage: python benchmarks/quantization.py [--steps N] [--rows demo|reference] [--folder F]

SmolLM2-135M on a CPU. First the model as it comes under every scheme: which data the scheme needs,
bytes of its weights, tokens/s of greedy generation (one prompt and four, medians of three), the
perplexity of the held-out answers of the demo, whose other rows calibrate, and that of text of
another kind, from Python's language reference. Then the same model trained for N steps on rows of
one of the two, with its products rounded (method qat, int4 weights) and without (method full,
quantized afterwards): how much of the perplexity that int4 loses on the held-out part training
recovers. Each row is printed when it is known. Runs are kept in the folder, and gone on with.
"""

import argparse
import datetime
import functools
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

PROMPTS = ("The capital of France is", "Water boils at", "In 1969", "A prime number is")
NEW_TOKENS = 32
ROUNDS = 3
# (scheme, methods)
SCHEMES: list[tuple[str, tuple[str, ...]]] = [
    ("none", ()),
    ("int8", ()),
    ("fp8", ()),
    ("fp8-dynamic", ()),
    ("int8-dynamic", ()),
    ("int8-dynamic, tile 64", ()),
    ("int8-dynamic", ("smoothquant",)),
    ("int8-static", ()),
    ("int8-static", ("smoothquant",)),
    ("int8-static", ("smoothquant", "gptq")),
    ("nf4", ()),
    ("nf4", ("awq",)),
    ("nf4", ("gptq",)),
    ("int4", ()),
    ("int4", ("awq",)),
    ("int4", ("gptq",)),
    ("int4", ("awq", "gptq")),
    ("int4-dynamic", ()),
    ("int4-dynamic, tile 64", ("gptq",)),
]
CALIBRATION_TOKENS = 4096
OTHER_ROWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rows", choices=["demo", "reference"], default="demo")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "quantization"))
    parser.add_argument("--only", choices=["schemes", "training"])
    parser.add_argument("--modes", nargs="+", help="only these, such as 'int4 + awq'")
    args = parser.parse_args()
    import jax

    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, jax {jax.__version__}\n"
    )
    print("| mode | data needed | MB | tokens/s | tokens/s of 4 | perplexity | of other text |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    if args.only != "training":
        of_schemes(args.modes)
    if args.only != "schemes":
        of_training(args)


def of_schemes(only: list[str] | None) -> None:
    import dataclasses

    from llama_jax.commands.quantize import calibration_rows, quantize_calibrated
    from llama_jax.load import load

    model = load("smollm2-135m")
    tokens = calibration_rows(model, rows("train"), CALIBRATION_TOKENS)
    for name, methods in SCHEMES:
        mode, data, changed = " + ".join([name, *methods]), "none", model
        if only is not None and mode not in only:
            continue
        scheme, _, tile = name.partition(", tile ")
        options: dict[str, Any] = {"scheme": scheme, "tile": int(tile) if tile else None}
        if methods or scheme.endswith("static"):
            data = f"{sum(map(len, tokens))} tokens of unlabelled rows"
            params = quantize_calibrated(model, tokens, methods=methods, **options)
            changed = dataclasses.replace(model, params=params)
        elif scheme != "none":
            changed = quantized(model, **options)
        show(mode, data, changed)


def quantized(model: Any, scheme: str, tile: int | None = None) -> Any:
    import dataclasses

    from llama_jax.weights.quantize import quantize

    params = quantize(model.config, model.params, scheme=scheme, tile=tile)
    return dataclasses.replace(model, params=params)


def of_training(args: argparse.Namespace) -> None:
    import dataclasses

    from distillation import write_rows

    from llama_jax.load import Model
    from llama_jax.weights.qat_tree import convert_qat
    from train.config import load_run_config
    from train.loop import train

    config = Path(__file__).parent.parent / "configs" / "smollm2-135m-full-cpu.yaml"

    args.folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.folder)
    reference = args.rows == "reference"
    source = str(args.folder / "train.jsonl") if reference else "package:demo/train.jsonl"

    def trained(method: str, *overrides: str) -> Model:
        run = load_run_config(
            config,
            [
                f"method={method}",
                f"train.steps={args.steps}",
                f"train.batch_size={args.batch_size}",
                f"train.sequence_length={args.sequence_length}",
                f"data.train={source}",
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
    data = f"{args.steps} steps of {args.rows} rows"
    before = show("trained", data, plain)
    after = show("trained, then int4-dynamic", "the same", quantized(plain, "int4-dynamic"))
    rounded = trained("qat", "qat.bits=4")
    integers = dataclasses.replace(rounded, params=convert_qat(rounded.params))
    qat = show("QAT int4", "the same", integers)
    lost, kept = after[reference] - before[reference], qat[reference] - before[reference]
    print(f"QAT recovers {1 - kept / lost:.0%} of what int4 loses on held-out {args.rows} rows")


@functools.cache
def other_rows() -> list[Any]:
    from distillation import write_rows

    from train.data.sources import read_rows

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        lines = (Path(folder) / "heldout.jsonl").read_text().splitlines()
        few = Path(folder) / "few.jsonl"
        few.write_text("\n".join(lines[:OTHER_ROWS]) + "\n")
        return list(read_rows([str(few)]))


def rows(name: str) -> list[Any]:
    from train.data.sources import read_rows

    return list(read_rows([f"package:demo/{name}.jsonl"]))


def show(mode: str, data: str, model: Any) -> list[float]:
    """Perplexities of the demo's answers and of the reference."""
    from infer.generate import generate
    from llama_jax import tree
    from llama_jax.commands.eval import evaluate
    from llama_jax.config import Compute

    def tokens_per_second(prompts: int) -> float:
        begin = time.perf_counter()
        outputs = generate(
            (model.config, model.params, model.tokenizer),
            list(PROMPTS[:prompts]),
            temperature=0.0,
            max_tokens=NEW_TOKENS,
        )
        return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - begin)

    speeds = []
    for prompts in (1, len(PROMPTS)):
        tokens_per_second(prompts)  # compiles
        speeds.append(statistics.median(tokens_per_second(prompts) for _ in range(ROUNDS)))
    found = [
        evaluate(model, each, compute=Compute(), match=False)["perplexity"]
        for each in (rows("heldout"), other_rows())
    ]
    size = tree.num_bytes(model.params) / 1e6
    print(
        f"| {mode} | {data} | {size:.0f} | {speeds[0]:.1f} | {speeds[1]:.1f} | {found[0]:.4f} "
        f"| {found[1]:.3f} |",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
