"""`launch` on Cloud TPU VMs: machines from asking for them to giving them back, and what is done to
those that are there."""

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from llama_jax.commands import run_config
from llama_jax.commands.report import Progress

# What --stop waits for: a step, and the save after it.
_STOP_SECONDS = 600
_LOG_SECONDS = 60
WAIT = "6h"

_print = partial(print, flush=True)  # a log is followed


def _target(args: argparse.Namespace) -> Any:
    from train.launch.plan import Target, default_name

    name = args.name or default_name(Path(args.config))
    return Target(name, args.project, args.zone, tunnel=args.iap)


def launch_on_machines(args: argparse.Namespace) -> dict[str, Any]:
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
        wait_seconds=to_seconds(WAIT if args.wait is None else args.wait),
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

    say = Progress().say
    say(machines.slice.describe())
    job = _job(args, machines, cargo, Shell(say))
    try:
        outcome = job.run()
    except (KeyboardInterrupt, RuntimeError):
        if job.holds:
            say(_left_behind(args, machines.target))
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


def act(args: argparse.Namespace) -> dict[str, Any]:
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
    runner = Shell(Progress().say)
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
