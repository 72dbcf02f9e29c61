"""`launch --gke`: a JobSet manifest, and kubectl where that is asked for."""

import argparse
import os
from pathlib import Path
from typing import Any

from llama_jax.commands import run_config
from llama_jax.commands.report import Progress


def launch_on_cluster(args: argparse.Namespace) -> dict[str, Any]:
    from train.launch.gcloud import Shell, check
    from train.launch.jobset import ClusterJob, manifest, read_cluster_secret
    from train.launch.places import place
    from train.launch.plan import check_fits_slice, default_name, slice_of
    from train.launch.secrets import Redactor, read_environment

    if args.image is None:
        raise ValueError("--gke needs --image, a container image with llama-jax in it")
    config = run_config.load(args)
    wanted = slice_of(config, args.slice)
    check_fits_slice(config, wanted)
    plain = read_environment(plain=args.env, secrets=[], forward=[], local=os.environ).plain
    job = ClusterJob(
        args.name or default_name(Path(args.config)),
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
        check(Shell(Progress().say), command, Redactor(), timeout=300.0)
    return report | {"applied": args.apply}
