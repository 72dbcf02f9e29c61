"""The flags that say which processes make up the program."""

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.mesh.processes import Processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "found by themselves on TPU slices; elsewhere give all three, or the environment variables "
        "LLAMA_JAX_COORDINATOR_ADDRESS, LLAMA_JAX_PROCESS_COUNT and LLAMA_JAX_PROCESS_ID. A count "
        "of 1 runs on this machine alone",
    )
    group.add_argument(
        "--coordinator-address", metavar="HOST:PORT", help="where process 0 can be reached"
    )
    group.add_argument("--process-count", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


def read(args: argparse.Namespace, *, cpu: bool = False) -> "Processes | None":
    """None: this one alone. cpu: whatever else the machine has. Raises ValueError."""
    from llama_jax.mesh.processes import read_processes

    return read_processes(
        address=args.coordinator_address,
        count=args.process_count,
        process_id=args.process_id,
        environment=os.environ,
        cpu=cpu,
    )
