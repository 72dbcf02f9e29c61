"""Trains on Cloud TPUs: creates the slice, installs, starts, follows the log, starts again after a
preemption, and gives the slice back.

SLICE is generation-chips, such as v5e-16 or v5p-64, 2xv5e-16 for two slices. Cloud counts cores
for v4 and v5p: write cloud:v5p-128 for what Cloud calls v5p-128, which has 64 chips. The run
folder must lie in a bucket: output=gs://BUCKET/PATH. docs/cloud-tpu.md is the guide."""

import argparse
from typing import Any

from llama_jax.commands import run_config
from llama_jax.commands.launch_machines import WAIT, act, launch_on_machines

HELP = "train on a Cloud TPU slice: VMs by queued resources, or a JobSet on GKE"
EXAMPLE = (
    "llama-jax launch tiny-lora-cpu.yaml mesh.cpu_devices=null output=gs://BUCKET/runs/first "
    "--slice v5e-4 --project PROJECT --zone us-west4-a --spot --dry-run"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_config.add_arguments(parser)
    parser.add_argument(
        "--slice", metavar="SLICE", help="such as v5e-16 (default: the config's mesh.slice)"
    )
    parser.add_argument("--project", help="the Google Cloud project")
    parser.add_argument("--zone", help="such as us-west4-a")
    parser.add_argument("--name", help="of the job and its machines (default: from the config)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print every command and manifest, run nothing"
    )
    actions = parser.add_argument_group(
        "instead of launching",
        "added to a launch's own words or to its config, project and zone alone: how the machines "
        "were made, and what runs on them, is then not read",
    ).add_mutually_exclusive_group()
    actions.add_argument("--status", action="store_true", help="machines and training now")
    actions.add_argument("--logs", action="store_true", help="the first worker's log so far")
    actions.add_argument("--stop", action="store_true", help="save, stop training, keep machines")
    actions.add_argument("--delete", action="store_true", help="delete the machines now")
    _add_machines(parser.add_argument_group("machines"))
    _add_job(parser.add_argument_group("job"))
    _add_cluster(parser.add_argument_group("GKE"))


def _add_machines(group: argparse._ArgumentGroup) -> None:
    tiers = group.add_mutually_exclusive_group()
    tiers.add_argument("--spot", action="store_true", help="cheaper, may be taken away any time")
    tiers.add_argument("--reserved", action="store_true", help="from a reservation")
    group.add_argument("--runtime-version", metavar="V", help="(default: by generation)")
    group.add_argument("--service-account", metavar="EMAIL", help="what the machines run as")
    group.add_argument("--network", help="(default: the project's default network)")
    group.add_argument("--subnetwork")
    group.add_argument("--internal-ips", action="store_true", help="no public addresses")
    group.add_argument("--iap", action="store_true", help="reach machines through IAP")
    group.add_argument("--wait", metavar="TIME", help=f"for machines (default: {WAIT})")


def _add_job(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--package",
        help="what to install: checkout, a .whl file, or llama-jax==… (default: checkout)",
    )
    group.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="no secrets"
    )
    group.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME=SECRET",
        help="a variable from Secret Manager (on GKE: NAME=SECRET/KEY of Kubernetes)",
    )
    group.add_argument(
        "--forward",
        action="append",
        default=[],
        metavar="NAME",
        help="a secret variable of this environment, sent in a file only you may read",
    )
    group.add_argument(
        "--retries", type=int, default=20, metavar="N", help="after preemptions (%(default)s)"
    )
    group.add_argument("--keep", action="store_true", help="keep the machines when training ends")
    group.add_argument("--detach", action="store_true", help="start, do not follow, keep machines")


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gke", action="store_true", help="write a JobSet manifest instead of VMs")
    group.add_argument("--image", help="container image with llama-jax (deploy/Dockerfile)")
    group.add_argument("--namespace", help="(default: default)")
    group.add_argument("--queue", metavar="NAME", help="Kueue's local queue")
    group.add_argument(
        "--manifest", metavar="FILE", help="where to write it (default: deploy/NAME.yaml)"
    )
    group.add_argument("--apply", action="store_true", help="also run kubectl apply")


def run(args: argparse.Namespace) -> dict[str, Any]:
    _check_given(args)
    _check_together(args)
    if args.gke:
        from llama_jax.commands.launch_cluster import launch_on_cluster

        return launch_on_cluster(args)
    if args.status or args.logs or args.stop or args.delete:
        return act(args)
    return launch_on_machines(args)


def _check_given(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag without a value: an empty variable of a script would otherwise
    mean a default, or the current folder. The config and its overrides speak for themselves."""
    for name, value in vars(args).items():
        if name in ("config", "overrides"):
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip():
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is empty; give it a value, or leave it out")


def _check_together(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that the chosen kind of launch would not read."""
    unread = {
        True: ("project", "zone", "reserved", "runtime_version", "network", "subnetwork",
               "internal_ips", "iap", "wait", "package", "forward", "keep", "detach", "status",
               "logs", "stop", "delete"),
        False: ("image", "namespace", "queue", "manifest", "apply"),
    }[args.gke]  # fmt: skip
    for name in unread:
        if getattr(args, name) not in (None, False, []):
            kind = "on GKE" if args.gke else "without --gke"
            raise ValueError(f"--{name.replace('_', '-')} means nothing {kind}; leave it out")
    if args.retries < 0:
        raise ValueError(f"--retries must be 0 or more, not {args.retries}")
    if not args.gke:
        for name in ("project", "zone"):
            if getattr(args, name) is None:
                raise ValueError(f"--{name} is missing")


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    if "topology" in report:
        print(f"# {report['slice']}: {report['chips']} chips, {report['topology']}, "
              f"{report['workers']} workers; run folder {report['run_dir']}")  # fmt: skip
    if report.get("dry_run"):
        for name, text in report["files"].items():
            print(f"# file {name}:\n{text}")
        for line in report["commands"]:
            print(line)
        return
    if "manifest" in report:
        done = "applied" if report["applied"] else "start it with: kubectl apply -f"
        print(f"{done} {report['manifest']}")
        return
    if "log_lines" in report:
        return
    if "topology" in report:
        print(f"{report['name']}: {report['state']} after {report['attempts']} starts; machines "
              f"{'deleted' if report['deleted'] else 'kept, and costing'}")  # fmt: skip
        return
    if "deleted" in report:
        print(f"{report['name']}: {'deleted' if report['deleted'] else 'there was none'}")
        return
    print(f"{report['name']}: {report['state']}")
    for worker in report.get("workers", []):
        code = "" if worker["exit_code"] is None else f" with {worker['exit_code']}"
        print(f"  {worker['host']}: {worker['state']}{code}")
