"""The answers a launch would get if all went well, so that a dry run writes down each command."""

import json

from train.launch.gcloud import Answer, DryRun
from train.launch.plan import Machines


def expected(machines: Machines, config_id: str) -> DryRun:
    absent = Answer(1, "", "NOT_FOUND: there is none yet")
    active = {
        "state": {"state": "ACTIVE"},
        "tpu": {"nodeSpec": [{"node": {"acceleratorType": machines.slice.cloud_accelerator_type}}]},
    }
    hosts = [f"worker-{number}" for number in range(machines.num_workers)]
    before = "".join(f"llama-jax-status {host} absent -\n" for host in hosts)
    after = "".join(f"llama-jax-status {host} exited:0 {config_id}\n" for host in hosts)
    return DryRun(
        [
            (("queued-resources", "describe"), [absent, Answer(0, json.dumps(active))]),
            (("tpu-vm", "describe"), [Answer(0, "READY\n")]),
            (
                ("queued-resources", "ssh"),
                # In turn: the folder, the states, install, start, the log, the states.
                [*(Answer(0, text) for text in ("", before, "", "", "", after))],
            ),
        ]
    )
