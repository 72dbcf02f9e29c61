"""Queued resources: Cloud's requests for TPU slices, from waiting in line to deletion.

Flags and states are those of `gcloud compute tpus queued-resources` and of the TPU API v2
(cloud.google.com/tpu/docs/queued-resources).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from train.launch.gcloud import CommandError, Runner, check, meaning
from train.launch.plan import Machines, Target
from train.launch.secrets import Redactor

# States that are none of these are those of a request that waits.
ACTIVE = "ACTIVE"
GOING = ("SUSPENDING", "DELETING")
# Nothing comes of these any more: the request has to be deleted and made again.
DEAD = ("SUSPENDED", "FAILED")

# States of a node that was taken away, and of one that comes back by itself.
NODE_GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN", "HIDING")
NODE_COMING = ("CREATING", "STARTING", "RESTARTING", "REPAIRING", "REIMAGING", "UNHIDING")

_BASE = ("gcloud", "compute", "tpus")
_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Request:
    """A queued resource that exists. reason: what the service says of a failure."""

    state: str
    accelerator_type: str | None
    num_nodes: int
    spot: bool
    reason: str = ""


def _where(target: Target) -> tuple[str, ...]:
    return (f"--project={target.project}", f"--zone={target.zone}", "--quiet")


def create_command(machines: Machines) -> list[str]:
    target, wanted = machines.target, machines.slice
    command = [
        *_BASE, "queued-resources", "create", target.name, *_where(target),
        f"--accelerator-type={wanted.cloud_accelerator_type}",
        f"--runtime-version={machines.runtime_version}",
        # Nobody waits any more after that, so the machines must not come, and cost, later.
        f"--valid-until-duration={machines.wait_seconds}s",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--labels=made-by=llama-jax",
    ]  # fmt: skip
    if wanted.count == 1:
        command.append(f"--node-id={target.name}")
    else:
        command += [f"--node-count={wanted.count}", f"--node-prefix={target.name}"]
    if machines.tier != "on-demand":
        command.append(f"--{machines.tier}")
    for name in ("service_account", "network", "subnetwork"):
        if getattr(machines, name) is not None:
            command.append(f"--{name.replace('_', '-')}={getattr(machines, name)}")
    if machines.internal_ips:
        command.append("--internal-ips")
    return command


def describe_command(target: Target) -> list[str]:
    return [
        *_BASE, "queued-resources", "describe", target.name, *_where(target), "--format=json",
    ]  # fmt: skip


def delete_command(target: Target) -> list[str]:
    """--force: the nodes are deleted with the request, which could not go before them."""
    return [*_BASE, "queued-resources", "delete", target.name, *_where(target), "--force"]


def node_command(target: Target, node: str) -> list[str]:
    return [
        *_BASE, "tpu-vm", "describe", node, *_where(target), "--format=value(state)",
    ]  # fmt: skip


def find(runner: Runner, target: Target, redact: Redactor) -> Request | None:
    """The request of that name, None where there is none."""
    try:
        said = check(runner, describe_command(target), redact, timeout=_ANSWER_SECONDS)
    except CommandError as error:
        if error.kind == "missing":
            return None
        raise
    return parse_request(said)


def parse_request(text: str) -> Request:
    """Reads what `describe --format=json` prints."""
    try:
        found: dict[str, Any] = json.loads(text)
        state = found["state"]["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"gcloud describes the queued resource in an unknown way: {text[:200]}"
        ) from error
    specs = found.get("tpu", {}).get("nodeSpec", [])
    first = specs[0] if specs else {}
    several = first.get("multisliceParams", first.get("multiNodeParams", {}))
    details = found["state"].get("failedData", {}).get("error", {})
    return Request(
        state=str(state),
        accelerator_type=first.get("node", {}).get("acceleratorType"),
        num_nodes=int(several.get("nodeCount", max(1, len(specs)))),
        spot="spot" in found,
        reason=str(details.get("message", "")),
    )


def check_same(machines: Machines, request: Request) -> None:
    """Raises ValueError where a request of that name asks for other machines."""
    wanted = machines.slice
    asked = (wanted.cloud_accelerator_type, wanted.count, machines.tier == "spot")
    found = (request.accelerator_type, request.num_nodes, request.spot)
    if asked != found:
        raise ValueError(
            f"the queued resource {machines.target.name} exists and is {_tier(found)}, not "
            f"{_tier(asked)}; choose another --name, or remove it with --delete"
        )


def _tier(kind: tuple[str | None, int, bool]) -> str:
    accelerator, count, spot = kind
    return f"{count} × {accelerator}, {'spot' if spot else 'not spot'}"


def delete(runner: Runner, target: Target, redact: Redactor) -> bool:
    """Deletes request and machines, and returns when they are gone; False if there were none."""
    try:
        check(runner, delete_command(target), redact, timeout=2 * _ANSWER_SECONDS)
    except CommandError as error:
        if error.kind == "missing":
            return False
        raise
    return True


def node_states(runner: Runner, target: Target, nodes: Sequence[str]) -> list[str]:
    """One state for each node; `MISSING` for one that is not there, `UNKNOWN` without an answer."""
    states = []
    for node in nodes:
        answer = runner.run(node_command(target, node), timeout=_ANSWER_SECONDS)
        if answer.ok:
            states.append(answer.stdout.strip() or "UNKNOWN")
        else:
            states.append("MISSING" if meaning(answer.stderr)[0] == "missing" else "UNKNOWN")
    return states


def create(runner: Runner, machines: Machines, redact: Redactor) -> None:
    check(runner, create_command(machines), redact, timeout=_ANSWER_SECONDS)


def wait_until_active(
    runner: Runner,
    machines: Machines,
    redact: Redactor,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    poll_seconds: float,
) -> None:
    """Returns when the machines are there.

    Raises CommandError when the request failed (`failed`), the machines went away before they were
    used (`gone`), or nothing came in time (`wait`).
    """
    target, start, said = machines.target, clock(), ""
    while True:
        request = find(runner, target, redact)
        if request is None:
            raise CommandError(
                f"the queued resource {target.name} was deleted by someone", "failed"
            )
        if request.state == ACTIVE:
            return
        if request.state in DEAD:
            reason = f": {redact(request.reason)}" if request.reason else ""
            advice = meaning(request.reason)[1]
            raise CommandError(
                f"the queued resource {target.name} is {request.state}{reason}. {advice}".strip(),
                "failed" if request.state == "FAILED" else "gone",
            )
        waited = clock() - start
        if waited >= machines.wait_seconds:
            raise CommandError(
                f"no {machines.slice.name} came within {machines.wait_seconds} seconds (the "
                f"request is {request.state}); try another --zone, --spot, or a longer --wait",
                "wait",
            )
        if request.state != said:
            said = request.state
            runner.note(f"{target.name} is {said}")
        sleep(poll_seconds)
