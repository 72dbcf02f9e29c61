"""A server that starts the training command in forks of itself, so that imports cost once.

For each line with JSON arguments on standard input a child runs the command's own `main` with them;
a line `started PID` and, when it is over, `ended STATUS` (negative: the signal) come back. JAX is
imported, but not awake: a fork is safe then.
"""

import json
import os
import sys
import threading

import orbax.checkpoint

import train.loop
from llama_jax.cli import main


def serve() -> None:
    assert train.loop.jax and orbax.checkpoint  # imported before the forks, which all need them
    assert threading.active_count() == 1
    assert len(os.listdir("/proc/self/task")) == 1, "a thread runs already; a fork would lose it"
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            os._exit(main(json.loads(line)))
        print("started", process, flush=True)
        _, status = os.waitpid(process, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
