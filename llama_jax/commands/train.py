"""Trains as a run config says; the same command again goes on where it stopped.

CONFIG.yaml is a file, or the name of a shipped one. Fields are changed with key=value, whose keys
have dots: train.steps=20 output=runs/a.

On SIGTERM the state is saved within train.grace_seconds and the exit code is 75: start the command
again and it goes on. Killed in any other way it goes on from the latest complete checkpoint, with
nothing to clean up. Several processes need an output folder that all of them see."""

import argparse
import logging
import sys
from typing import Any

from llama_jax.commands import processes, run_config

HELP = "train from a run config: LoRA, QLoRA, full or pretraining"
EXAMPLE = "llama-jax train tiny-lora-cpu.yaml train.steps=20 output=runs/first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_config.add_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check, build and lower the step; read no weights and write nothing",
    )
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="trace so many steps, or those from FIRST-LAST, into the run folder",
    )
    processes.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.samples import sample
    from llama_jax.commands.startup import start_jax
    from llama_jax.commands.steps import Steps

    if args.dry_run and args.profile is not None:
        raise ValueError("--profile traces steps, of which --dry-run makes none; keep one")
    config = run_config.load(args)
    emulated = config.mesh.cpu_devices
    start_jax(cpu_devices=emulated, processes=processes.read(args, cpu=emulated is not None))
    from llama_jax.mesh.distributed import is_main
    from train.build import dry_run
    from train.loop import train
    from train.profiler import read_steps

    profile = read_steps(args.profile) if args.profile is not None else None
    if not is_main():
        for ours in ("llama_jax", "train"):
            logging.getLogger(ours).setLevel(logging.WARNING)
    if args.dry_run:
        return {"dry_run": True, **dry_run(config)}
    result = train(
        config,
        progress=Steps().update if is_main() else None,
        sampler=sample if config.train.sample_prompts else None,
        profile=profile,
    )
    return {
        "run_dir": str(result.run_dir),
        "steps": result.steps,
        "final_loss": result.final_loss,
        "skipped": result.counters,
    }


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    from llama_jax.commands.report import print_table, to_size
    from llama_jax.mesh.distributed import is_main

    if args.dry_run:
        data = report["data"]
        rows = [
            ("devices", f"{report['devices']} ({_mesh(report['mesh'])})"),
            ("parameters", f"{report['parameters']:,}"),
            ("trained parameters", f"{report['trained_parameters']:,}"),
            ("parameters and optimizer", to_size(report["state_bytes"])),
            ("samples", f"{data['samples']} of {data['rows']} rows"),
            ("trained tokens", f"{data['trained_tokens']} of {data['tokens']}"),
        ]
        print_table(f"{args.config} builds and lowers", ("", "value"), rows)
        return
    if not is_main():
        return
    print(
        f"{report['steps']} steps, loss {report['final_loss']:.4f}; "
        f"see {report['run_dir']}/report.html"
    )
    for reason, count in report["skipped"].items():
        sys.stderr.write(f"{count} {reason.replace('_', ' ')}\n")


def _mesh(sizes: dict[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
