"""A real Llama, end to end, on this machine.

Loads SmolLM2-135M-Instruct, fine-tunes it with LoRA on emulated devices to turn sentences into
strict JSON records, scores it on held-out rows before and after, merges the adapter, exports a
Hugging Face folder, and generates a batch from that export."""

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.commands.report import Progress
    from llama_jax.load import Model
    from train.config import RunConfig

HELP = "load a real Llama, fine-tune it, measure it, export it, generate from the export"
EXAMPLE = "llama-jax demo --json"

CONFIG = "smollm2-135m-lora-cpu.yaml"
MARKER = "demo-run.txt"

# Sentences of no split, for the last step: what the exported model is for.
BATCH = (
    "Please send seven wall clocks to our shop in Lisbon by Friday.",
    "We are three guests and want a tennis court in Oslo on Sunday.",
    "The two glass bowls came broken, so I return them.",
    "Could you reserve a minibus in Nairobi for ten of us?",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices", type=int, metavar="N", help="emulated devices (default: as the config says, 8)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: config)")
    parser.add_argument(
        "--out",
        default="runs/demo",
        metavar="DIR",
        help="the folder to write; an earlier demo in it is replaced (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.report import Progress
    from llama_jax.commands.startup import start_jax

    began = time.monotonic()
    config = _config(args, Path(args.out))
    out = prepare_out(args.out)
    start_jax(cpu_devices=config.mesh.cpu_devices)
    from llama_jax.load import load

    progress = Progress()
    name = config.model.name
    progress.say(f"1/6 loading {name}")
    model = load(name, dtype=config.model.dtype)
    progress.say("2/6 scoring it on held-out rows")
    before = score(model, config, progress)
    del model
    progress.say(f"3/6 fine-tuning it with LoRA on {config.mesh.cpu_devices} emulated devices")
    tuned = fine_tune(config)
    progress.say("4/6 merging the adapter and exporting a Hugging Face folder")
    export = export_merged(tuned, out / "export")
    progress.say("5/6 scoring the export on the same rows")
    exported = load(export)
    after = score(exported, config, progress)
    progress.say("6/6 generating a batch from the export")
    return {
        "model": name,
        "devices": config.mesh.cpu_devices,
        "before": before,
        "after": after,
        "export": str(export),
        "steps": config.train.steps,
        "run_dir": config.output,
        "batch": generate_batch(exported, config),
        "seconds": time.monotonic() - began,
    }


def prepare_out(name: str) -> Path:
    """An empty folder for this demo. Raises ValueError where something else lies."""
    if not name.strip():
        raise ValueError("--out is empty; name the folder to write")
    out = Path(name)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ValueError(f"--out {out} is not empty and holds no demo; choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Written by llama-jax demo, which replaces this folder.\n")
    return out


def _config(args: argparse.Namespace, out: Path) -> "RunConfig":
    from llama_jax.commands.run_config import configs_folder
    from train.config import load_run_config

    path, overrides = configs_folder() / CONFIG, [f"output={out / 'run'}"]
    if args.devices is not None:
        overrides.append(f"mesh.cpu_devices={args.devices}")
    config = load_run_config(path, overrides)
    if args.steps is None:
        return config
    # A shorter run has a shorter warm-up, of the same part of its steps.
    warmup = config.schedule.warmup_steps
    warmup = min(warmup, warmup * args.steps // config.train.steps)
    overrides += [f"train.steps={args.steps}", f"schedule.warmup_steps={warmup}"]
    return load_run_config(path, overrides)


def score(model: "Model", config: "RunConfig", progress: "Progress") -> dict[str, float]:
    """Answer loss and exact match on the held-out rows."""
    from llama_jax.commands.eval import evaluate
    from train.data.sources import read_rows

    report = evaluate(
        model,
        list(read_rows(config.data.eval)),
        compute=config.compute,
        progress=progress.update,
    )
    return {
        "exact_match": report["exact_match"],
        "loss": report["loss"],
        "rows": report["rows"],
        "tokens": report["tokens"],
    }


def fine_tune(config: "RunConfig") -> "Model":
    """The model with its trained adapter, as it lies on the mesh."""
    from llama_jax.commands.steps import Steps
    from llama_jax.load import Model
    from train.loop import train

    result = train(config, progress=Steps().update)
    return Model(result.config, result.params, result.tokenizer)


def export_merged(tuned: "Model", folder: Path) -> Path:
    """The adapter added into the weights, as a Hugging Face folder."""
    import dataclasses

    from llama_jax.load import save_hf
    from llama_jax.weights.lora import merge_lora

    merged = dataclasses.replace(tuned, params=merge_lora(tuned.params))
    save_hf(merged, folder)
    return folder


def generate_batch(model: "Model", config: "RunConfig") -> list[dict[str, str]]:
    from infer.generate import generate
    from llama_jax.demo.make_task import SYSTEM

    prompts = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": sentence}]
        for sentence in BATCH
    ]
    outputs = generate(
        model, prompts, chat=True, temperature=0.0, max_tokens=64, compute=config.compute
    )
    return [
        {"prompt": sentence, "text": output.text or ""}
        for sentence, output in zip(BATCH, outputs, strict=True)
    ]


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    del args
    from llama_jax.commands.report import print_table

    before, after = report["before"], report["after"]
    print_table(
        f"{report['model']}, {report['steps']} LoRA steps on {report['devices']} emulated devices",
        ("held-out rows", "before", "after"),
        [
            ("exact match", f"{before['exact_match']:.1%}", f"{after['exact_match']:.1%}"),
            ("answer loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}"),
        ],
    )
    for row in report["batch"]:
        print(f"> {row['prompt']}\n  {row['text']}")
    print(
        f"export: {report['export']}\nreport: {report['run_dir']}/report.html\n"
        f"{report['seconds']:.0f} s"
    )
