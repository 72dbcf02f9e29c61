"""Devices, versions, environment, what is wrong and how to mend it.

Exits with 1 when something is wrong that stops work."""

import argparse
import threading
from typing import Any

HELP = "devices, versions, environment, what is wrong and how to mend it"
EXAMPLE = "llama-jax doctor --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long to wait for devices (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.startup import cache_dir
    from llama_jax.doctor import examine

    if args.timeout <= 0:
        raise ValueError(f"--timeout must be more than 0 seconds, not {args.timeout}")
    if not args.timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"--timeout must be a number of seconds, not {args.timeout}")
    return examine(cache_dir=cache_dir(), timeout_seconds=args.timeout).to_json()


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    from llama_jax.commands.report import print_table, to_size

    memory = report["memory_bytes"]
    facts = [
        ("Python", f"{report['python']} on {report['system']}"),
        ("processor", f"{report['cores']} cores"),
        ("memory", "unknown" if memory is None else to_size(memory)),
        ("devices", _devices(report["devices"])),
        ("compiled programs", report["cache_dir"] or "not kept"),
        ("extras", ", ".join(name for name, has in report["extras"].items() if has) or "none"),
        *((name, value) for name, value in report["environment"].items()),
    ]
    print_table("This machine", ("", "value"), facts)
    versions = [(name, version or "missing") for name, version in report["versions"].items()]
    print_table("Versions", ("package", "installed"), versions)
    if not report["problems"]:
        print("Nothing is wrong.")
    for problem in report["problems"]:
        mark = "wrong" if problem["fatal"] else "note"
        print(f"{mark}: {problem['what']}\n  mend: {problem['mend']}")


def _devices(devices: list[dict[str, Any]]) -> str:
    kinds = [device["kind"] for device in devices]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "none"
