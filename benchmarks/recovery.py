"""SmolLM2-135M pruned, then distilled from itself: how much of what it lost comes back.

    python benchmarks/recovery.py --folder /tmp/recovery --steps 24

Rows are those of benchmarks/distillation.py: Python's language reference, an eighth of it held out.
Each way of pruning makes a Hugging Face folder, training goes on from that with the unpruned model
as its teacher, and what comes of it is exported and scored again. A table is printed as it goes;
it is in docs/pruning.md.
"""

import argparse
import json
import time
from pathlib import Path

from distillation import CONFIG, write_rows

from llama_jax.commands.startup import start_jax

MODEL = "smollm2-135m"
# name -> (flags of prune, whether zeros are held)
WAYS: dict[str, tuple[tuple[str, ...], bool]] = {
    "24 of 30 layers": (("--layers", "24"), False),
    "2:4, wanda": (("--pattern", "2:4", "--method", "wanda"), True),
    "1152 of 1536 feed-forward units": (("--units", "1152"), False),
}


def command(*arguments: str) -> dict:
    """What a command of llama-jax reports."""
    import contextlib
    import io

    from llama_jax import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main([*arguments, "--json"])
    if code:
        raise SystemExit(f"llama-jax {' '.join(arguments)} ended with {code}")
    return json.loads(out.getvalue())


def recovered(folder: Path, name: str, flags: tuple[str, ...], held: bool, steps: int) -> None:
    from train.config import load_run_config
    from train.loop import train

    slug = "".join(c if c.isalnum() else "-" for c in name)
    pruned, out = folder / f"{slug}-pruned", folder / f"{slug}-recovered"
    rows = ("--calibration", str(folder / "train.jsonl"), "--calibration-rows", "16")
    report = command("prune", MODEL, str(pruned), *flags, *rows, "--overwrite")
    before = score(folder, pruned)
    begin = time.monotonic()
    train(
        load_run_config(
            CONFIG,
            [
                "model.init=weights",
                "model.overrides={}",
                f"model.name={pruned}",
                f"model.keep_zeros={str(held).lower()}",
                f"data.train={folder / 'train.jsonl'}",
                "data.eval=[]",
                f"train.steps={steps}",
                f"schedule.warmup_steps={min(4, steps // 4)}",
                "optimizer.learning_rate=1e-4",
                f"output={folder / slug}",
            ],
        )
    )
    seconds = time.monotonic() - begin
    flags = ("--format", "hf", "--overwrite")
    command("export", str(folder / slug), str(out), *flags)
    after = score(folder, out)
    millions = report["parameters"] / 1e6
    print(
        f"| {name} | {millions:.0f} M, {report['sparsity']:.0%} zero | {before:.1f} | {after:.1f} "
        f"| {seconds / 60:.1f} min |",
        flush=True,
    )


def score(folder: Path, model: str | Path) -> float:
    return command("eval", str(model), "--data", str(folder / "heldout.jsonl"))["perplexity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for rows, models and runs")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.folder)
    start_jax(cpu_devices=1)
    print("| | size | pruned | recovered | cost |\n|---|---|---|---|---|")
    print(f"| as it is | 135 M | {score(args.folder, MODEL):.1f} | | |", flush=True)
    for name in args.ways:
        recovered(args.folder, name, *WAYS[name], args.steps)


if __name__ == "__main__":
    main()
