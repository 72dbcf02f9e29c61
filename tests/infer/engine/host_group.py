"""Two real processes of one server, for tests."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.train.command import free_port

ROOT = Path(__file__).parents[3]
SECONDS = 240
# Small enough that two long answers do not fit together.
SERVE = ("--mesh", "tensor=2,fsdp=2", "--max-slots", "2", "--block-size", "16")
ROOM = ("--piece-tokens", "32", "--max-context", "128", "--cache-tokens", "128")


class Group:
    """Processes of one server; process 0 listens. others: flags of process 1. folders: where they
    run."""

    def __init__(self, *flags, cache, others=None, folders=(None, None)):
        environment = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "2",
            "LLAMA_JAX_CACHE_DIR": str(cache),
            "LLAMA_JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "LLAMA_JAX_PROCESS_COUNT": "2",
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self.port = free_port()
        command = [sys.executable, "-m", "llama_jax.cli", "serve"]
        self.processes = [
            subprocess.Popen(
                [*command, *each, "--port", str(self.port), "--process-id", str(number)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folders[number],
            )
            for number, each in enumerate([flags, flags if others is None else others])
        ]

    def wait_ready(self):
        end = time.monotonic() + SECONDS
        while True:
            assert all(each.poll() is None for each in self.processes), self.ended()
            assert time.monotonic() < end, "not ready"
            with contextlib.suppress(OSError), self.open("/readyz"):
                return
            time.sleep(0.1)

    def open(self, path, body=None, **headers):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("content-type", "application/json")
        return urllib.request.urlopen(request, timeout=SECONDS)

    def complete(self, prompt, **fields):
        with self.open("/v1/completions", {"model": "m", "prompt": prompt, **fields}) as response:
            return json.load(response)["choices"]

    def ended(self):
        """(exit code, standard error) of each."""
        errors = [each.communicate(timeout=SECONDS)[1] for each in self.processes]
        return [(each.returncode, e) for each, e in zip(self.processes, errors, strict=True)]


@contextlib.contextmanager
def starting():
    """Makes groups; whatever still runs at the end of a test is ended."""
    groups = []

    def started(*flags, **others):
        groups.append(Group(*flags, **others))
        return groups[-1]

    try:
        yield started
    finally:
        for process in (each for group in groups for each in group.processes):
            process.kill()
            process.wait()
            process.stderr.close()
