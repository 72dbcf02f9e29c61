"""A student with half of SmolLM2-135M's layers: distilled, and trained on hard labels alone.

    python benchmarks/distillation.py --folder /tmp/distillation --steps 100

Both students start from the same slices and see the same rows in the same order: the topics of
Python's language reference, which every Python brings as text, an eighth of them held out. Prints
held-out KL to the teacher, perplexity and agreement before and after. Result: docs/distillation.md.
"""

import argparse
import json
import time
from pathlib import Path
from pydoc_data.topics import topics

from llama_jax.commands.startup import start_jax

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "smollm2-135m-distill-cpu.yaml"
HELD_OUT_EVERY = 8
HELD_OUT_CHARACTERS = 24_000


def write_rows(folder: Path) -> None:
    """train.jsonl and heldout.jsonl of text rows."""
    lots: dict[str, list[str]] = {"train": [], "heldout": []}
    for number, name in enumerate(sorted(topics)):
        held_out = number % HELD_OUT_EVERY == 0
        lots["heldout" if held_out else "train"].append(topics[name])
    size, kept = 0, []
    for text in lots["heldout"]:
        if size < HELD_OUT_CHARACTERS:
            kept.append(text[: HELD_OUT_CHARACTERS - size])
            size += len(kept[-1])
    for name, texts in (("train", lots["train"]), ("heldout", kept)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def run(folder: Path, name: str, *overrides: str) -> dict:
    """Held-out numbers at the end of a run."""
    from train.config import load_run_config
    from train.loop import train
    from train.metrics import read_metrics

    fixed = [
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'heldout.jsonl'}",
        f"output={folder / name}",
    ]
    begin = time.monotonic()
    result = train(load_run_config(CONFIG, [*fixed, *overrides]))
    entry = read_metrics(result.run_dir / "metrics.jsonl")[-1]
    return {
        "run": name,
        "kl": entry["eval_kl"],
        "cross_entropy": entry["eval_hard_loss"],
        "agreement": entry["eval_agreement"],
        "tokens": entry["eval_tokens"],
        "seconds": time.monotonic() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for rows and runs")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.folder)
    start_jax(cpu_devices=1)
    still = ("train.steps=1", "optimizer.learning_rate=0", "schedule.warmup_steps=0")
    steps = (f"train.steps={args.steps}", f"schedule.warmup_steps={min(10, args.steps // 4)}")
    rows = [
        ("teacher", ("model.init=weights", "model.overrides={}", *still)),
        ("before", still),
        ("distilled", steps),
        ("hard_labels", ("distill.soft_weight=0", *steps)),
    ]
    for name, overrides in rows:
        print(json.dumps(run(args.folder, name, *overrides)), flush=True)


if __name__ == "__main__":
    main()
