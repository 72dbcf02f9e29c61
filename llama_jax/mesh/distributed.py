"""Several processes as one program: they meet, agree, and share out rows.

Nothing here runs at import, and with one process everything is a plain call.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from llama_jax.mesh.processes import COUNT_VARIABLE, Processes

# A host that is gone is noticed after this long without a sign of life.
HEARTBEAT_SECONDS = 100
# How long a process that ends waits for the others to end as well. After a failure of one it waits
# in vain: they are stuck in a collective until it is gone.
SHUTDOWN_SECONDS = 30
# How long processes wait for each other where files are read or written in between.
EXCHANGE_SECONDS = 1800.0


class ProcessError(RuntimeError):
    """Something went wrong in one of several processes; the message says in which."""


def join(processes: Processes | None, *, timeout_seconds: int = 300) -> None:
    """Meets the other processes; must come before anything that asks JAX for a device.

    Raises RuntimeError when they do not come in time, or when JAX runs already.
    """
    if processes is None:
        return
    # This program answers SIGTERM itself; JAX's service would swallow it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            processes.address,
            processes.count,
            processes.id,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        who = (
            f"process {processes.id} of {processes.count} and the coordinator at "
            f"{processes.address} did not meet"
            if processes.address
            else f"JAX did not find the other hosts of this slice; set {COUNT_VARIABLE}=1 to run "
            f"on this one alone"
        )
        raise RuntimeError(f"{who}: {error}") from error


def is_main() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this process is the whole program."""
    return jax.process_count() == 1


# Agreement


_turns = itertools.count()


def exchange(name: str, value: str = "", *, timeout_seconds: float = EXCHANGE_SECONDS) -> list[str]:
    """The `value` that each process gave, in their order; also a point that all must reach.

    `name` must be new in each call, and the same in all processes. Works in any thread, beside
    running steps: it takes the coordination service, not the devices.

    Raises ProcessError when the others do not come in time.
    """
    if jax.process_count() == 1:
        return [value]
    from jax._src import distributed  # the only door to the coordination service

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("several processes run, but jax.distributed was not initialized")
    key = f"llama_jax/{name}"
    # The values lie apart from the name of the barrier: a prefix of one is not that of another.
    client.key_value_set(f"{key}/value/{jax.process_index()}", value)
    try:
        client.wait_at_barrier(key, int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"other processes did not reach {name!r}: {error}") from error
    return [
        client.blocking_key_value_get(f"{key}/value/{index}", 60_000)
        for index in range(jax.process_count())
    ]


@contextlib.contextmanager
def agreed(name: str) -> Iterator[None]:
    """A block that succeeds in all processes or in none: who had no error gets a ProcessError
    that names one who had. `name` as in `exchange`."""
    try:
        yield
    except Exception as error:
        exchange(name, f"{error or type(error).__name__}")
        raise
    for index, message in enumerate(exchange(name)):
        if message:
            raise ProcessError(f"process {index}: {message}")


def coordinator_host() -> str:
    """Where process 0 can be reached from the others."""
    from jax._src import distributed

    address = distributed.global_state.coordinator_address
    if address is None:
        raise RuntimeError("there is one process only, or jax.distributed was not initialized")
    return str(address.rpartition(":")[0].strip("[]"))


def leave() -> None:
    """The end of all processes together: each waits here for the others, for a while. Without it, a
    process whose coordinator has ended is aborted, whatever it was about to say."""
    if jax.distributed.is_initialized():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()


# For the main thread, where all processes do the same in the same order.


def _turn(name: str) -> str:
    return f"{next(_turns)}/{name}"


def gather(name: str, value: str) -> list[str]:
    """`exchange` under a name of its own."""
    return exchange(_turn(name), value)


def barrier(name: str) -> None:
    """All processes wait here for each other."""
    exchange(_turn(name))


def all_or_none(name: str) -> contextlib.AbstractContextManager[None]:
    """`agreed` under a name of its own."""
    return agreed(_turn(name))


def run_on_main(name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives in process 0, in all processes; a JSON value. So is its error."""
    turn, result = _turn(name), None
    with agreed(f"{turn}/done"):
        if is_main():
            result = work()
    return json.loads(exchange(f"{turn}/result", json.dumps(result))[0])


# Rows


@dataclass(frozen=True)
class Share:
    """Which rows of a global batch a process brings: part `index` of `count` equal ones."""

    index: int = 0
    count: int = 1

    def rows(self, total: int) -> slice:
        size = total // self.count
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Share()


def row_share(sharding: Sharding, shape: tuple[int, ...]) -> Share:
    """The part of a batch [rows, …] of this shape that the devices of this process need.

    Processes whose devices hold the same rows, as with tensors spread over hosts, get the same
    part. Where the rows of a process are no such part, everyone brings the whole batch.
    """
    rows = shape[0]
    blocks: dict[int, set[int]] = {}
    device: Any
    index: Any
    for device, index in sharding.devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(rows)
        blocks.setdefault(device.process_index, set()).update(range(start, stop))
    sizes = {len(block) for block in blocks.values()}
    size = max(sizes)
    even = len(sizes) == 1 and rows % size == 0
    if not even or not all(_is_part(block, size) for block in blocks.values()):
        return WHOLE
    return Share(min(blocks[jax.process_index()]) // size, rows // size)


def _is_part(block: set[int], size: int) -> bool:
    first = min(block)
    return first % size == 0 and max(block) - first + 1 == size


def place_rows(rows: Any, sharding: Sharding, share: Share = WHOLE) -> Any:
    """Global arrays from the rows of this process: host arrays [b, …], part of a batch
    [b * count, …], go straight to the devices that hold them."""
    if jax.process_count() == 1:
        return jax.device_put(rows, sharding)

    def place(part: np.ndarray) -> jax.Array:
        total = part.shape[0] * share.count
        first = share.rows(total).start

        def read(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            return part[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback((total, *part.shape[1:]), sharding, read)

    return jax.tree.map(place, rows)
