"""Trains on Cloud TPUs: creates the slice, installs, starts, follows the log, starts again after a
preemption, and gives the slice back.

SLICE is generation-chips, such as v5e-16 or v5p-64, 2xv5e-16 for two slices. Cloud counts cores
for v4 and v5p: write cloud:v5p-128 for what Cloud calls v5p-128, which has 64 chips. The run
folder must lie in a bucket: output=gs://BUCKET/PATH. docs/cloud-tpu.md is the guide."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from llama_jax.commands import run_config

HELP = "train on a Cloud TPU slice: VMs by queued resources, or a JobSet on GKE"
EXAMPLE = (
    "llama-jax launch tiny-lora-cpu.yaml mesh.cpu_devices=null output=gs://BUCKET/runs/first "
    "--slice v5e-4 --project PROJECT --zone us-west4-a --spot --dry-run"
)

# What --stop waits for: a step, and the save after it.
_STOP_SECONDS = 600
_LOG_SECONDS = 60
_WAIT = "6h"


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
    group.add_argument("--wait", metavar="TIME", help=f"for machines (default: {_WAIT})")


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
        return _on_cluster(args)
    if args.status or args.logs or args.stop or args.delete:
        return _act(args)
    return _on_machines(args)


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


def _name(args: argparse.Namespace) -> str:
    from train.launch.plan import default_name

    return args.name if args.name is not None else default_name(Path(args.config))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# Cloud TPU VMs


def _target(args: argparse.Namespace) -> Any:
    from train.launch.plan import Target

    return Target(_name(args), args.project, args.zone, tunnel=args.iap)


def _on_machines(args: argparse.Namespace) -> dict[str, Any]:
    from train.launch.package import CHECKOUT, read_package
    from train.launch.places import place
    from train.launch.plan import (
        Machines,
        check_fits_slice,
        runtime_version,
        slice_of,
        to_seconds,
    )
    from train.launch.secrets import read_environment
    from train.launch.staging import Cargo

    target, config = _target(args), run_config.load(args)
    wanted = slice_of(config, args.slice)
    machines = Machines(
        target,
        wanted,
        tier="spot" if args.spot else "reserved" if args.reserved else "on-demand",
        runtime_version=args.runtime_version or runtime_version(wanted),
        wait_seconds=to_seconds(_WAIT if args.wait is None else args.wait),
        service_account=args.service_account,
        network=args.network,
        subnetwork=args.subnetwork,
        internal_ips=args.internal_ips,
    )
    check_fits_slice(config, wanted)
    cargo = Cargo(
        place(config, may_copy=True),
        read_environment(
            plain=args.env, secrets=args.secret, forward=args.forward, local=os.environ
        ),
        read_package(CHECKOUT if args.package is None else args.package),
    )
    report = {
        "name": target.name,
        "slice": wanted.name,
        "chips": wanted.total_chips,
        "topology": "x".join(map(str, wanted.topology)),
        "accelerator_type": wanted.cloud_accelerator_type,
        "workers": machines.num_workers,
        "run_dir": config.output,
    }
    if args.dry_run:
        return report | _written_down(args, machines, cargo)
    return report | _launched(args, machines, cargo)


def _job(args: argparse.Namespace, machines: Any, cargo: Any, runner: Any) -> Any:
    from train.launch.secrets import Redactor
    from train.launch.tpu_vm import TpuVmJob

    return TpuVmJob(
        machines=machines,
        cargo=cargo,
        runner=runner,
        redact=Redactor(list(cargo.environment.forwarded.values())),
        show=_print,
        clock=time.monotonic,
        sleep=(lambda seconds: None) if args.dry_run else time.sleep,
        retries=args.retries,
        keep=args.keep,
        detach=args.detach,
    )


def _launched(args: argparse.Namespace, machines: Any, cargo: Any) -> dict[str, Any]:
    from train.launch.gcloud import Shell

    _say(machines.slice.describe())
    job = _job(args, machines, cargo, Shell(_say))
    try:
        outcome = job.run()
    except (KeyboardInterrupt, RuntimeError):
        if job.holds:
            _say(_left_behind(args, machines.target))
        raise
    return {
        "state": outcome.state,
        "attempts": outcome.attempts,
        "exit_code": outcome.exit_code,
        "deleted": outcome.deleted,
        "ok": outcome.state != "failed",
    }


def _left_behind(args: argparse.Namespace, target: Any) -> str:
    import shlex

    words = ["llama-jax", "launch", args.config, f"--name={target.name}"]
    words += [f"--project={target.project}", f"--zone={target.zone}"]
    command = shlex.join(words)
    return (
        f"The machines, or the request for them, are still there and cost money: {command} "
        f"--delete removes them, --status and --logs show them; the same launch again goes on "
        f"watching."
    )


def _written_down(args: argparse.Namespace, machines: Any, cargo: Any) -> dict[str, Any]:
    from train.launch.dry_run import expected

    runner = expected(machines, cargo.config_id)
    _job(args, machines, cargo, runner).run()
    return {"dry_run": True, "commands": runner.lines, "files": runner.files}


def _act(args: argparse.Namespace) -> dict[str, Any]:
    from train.launch import queued
    from train.launch.gcloud import DryRun, Shell
    from train.launch.secrets import Redactor
    from train.launch.workers import Workers

    target, redact = _target(args), Redactor()
    report: dict[str, Any] = {"name": target.name}
    if args.dry_run:
        written = DryRun([])
        workers = Workers(written, target, redact, time.sleep)
        if args.delete:
            queued.delete(written, target, redact)
        elif args.stop:
            workers.stop(_STOP_SECONDS)
        elif args.logs:
            workers.log(1, _LOG_SECONDS, _print)
        else:
            written.run(queued.describe_command(target))
            workers.states()
        return report | {"dry_run": True, "commands": written.lines, "files": {}}
    runner = Shell(_say)
    workers = Workers(runner, target, redact, time.sleep)
    if args.delete:
        return report | {"deleted": queued.delete(runner, target, redact)}
    found = queued.find(runner, target, redact)
    report["state"] = found.state if found is not None else "absent"
    if found is None or found.state != queued.ACTIVE:
        return report
    if args.stop:
        workers.stop(_STOP_SECONDS)
    if args.logs:
        return report | {"log_lines": workers.log(1, _LOG_SECONDS, _print)}
    states = [
        {"host": each.host, "state": each.state, "exit_code": each.exit_code}
        for each in workers.states()
    ]
    return report | {"workers": states}


# GKE


def _on_cluster(args: argparse.Namespace) -> dict[str, Any]:
    from train.launch.gcloud import Shell, check
    from train.launch.jobset import ClusterJob, manifest, read_cluster_secret
    from train.launch.places import place
    from train.launch.plan import check_fits_slice, slice_of
    from train.launch.secrets import Redactor, read_environment

    if args.image is None:
        raise ValueError("--gke needs --image, a container image with llama-jax in it")
    config = run_config.load(args)
    wanted = slice_of(config, args.slice)
    check_fits_slice(config, wanted)
    plain = read_environment(plain=args.env, secrets=[], forward=[], local=os.environ).plain
    job = ClusterJob(
        _name(args),
        wanted,
        place(config, may_copy=False),
        image=args.image,
        spot=args.spot,
        namespace="default" if args.namespace is None else args.namespace,
        service_account=args.service_account,
        max_restarts=args.retries,
        environment=plain,
        secrets=[read_cluster_secret(text) for text in args.secret],
        queue=args.queue,
    )
    text = manifest(job)
    path = Path(args.manifest) if args.manifest is not None else Path("deploy", f"{job.name}.yaml")
    if path.is_dir():
        raise ValueError(f"--manifest {path} is a folder; name the file to write")
    command = ["kubectl", "apply", "-f", str(path)]
    report = {
        "name": job.name,
        "slice": wanted.name,
        "chips": wanted.total_chips,
        "topology": "x".join(map(str, wanted.topology)),
        "workers": wanted.hosts * wanted.count,
        "run_dir": config.output,
        "manifest": str(path),
    }
    if args.dry_run:
        import shlex

        return report | {
            "dry_run": True,
            "commands": [shlex.join(command)],
            "files": {str(path): text},
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if args.apply:
        check(Shell(_say), command, Redactor(), timeout=300.0)
    return report | {"applied": args.apply}


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    if "topology" in report:
        _print(f"# {report['slice']}: {report['chips']} chips, {report['topology']}, "
               f"{report['workers']} workers; run folder {report['run_dir']}")  # fmt: skip
    if report.get("dry_run"):
        for name, text in report["files"].items():
            _print(f"# file {name}:\n{text}")
        for line in report["commands"]:
            _print(line)
        return
    if "manifest" in report:
        done = "applied" if report["applied"] else "start it with: kubectl apply -f"
        _print(f"{done} {report['manifest']}")
        return
    if "log_lines" in report:
        return
    if "topology" in report:
        _print(f"{report['name']}: {report['state']} after {report['attempts']} starts; machines "
               f"{'deleted' if report['deleted'] else 'kept, and costing'}")  # fmt: skip
        return
    if "deleted" in report:
        _print(f"{report['name']}: {'deleted' if report['deleted'] else 'there was none'}")
        return
    _print(f"{report['name']}: {report['state']}")
    for worker in report.get("workers", []):
        code = "" if worker["exit_code"] is None else f" with {worker['exit_code']}"
        _print(f"  {worker['host']}: {worker['state']}{code}")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
