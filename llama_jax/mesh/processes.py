"""Which processes make up the program. Settled before JAX is imported.

On TPU slices a process runs on every host, and JAX finds the others by itself. Elsewhere three
facts say it: the address of process 0, how many processes there are, and which one this is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# The environment's words for the fields of `Processes`, where no flag gives them.
ADDRESS_VARIABLE = "LLAMA_JAX_COORDINATOR_ADDRESS"
COUNT_VARIABLE = "LLAMA_JAX_PROCESS_COUNT"
ID_VARIABLE = "LLAMA_JAX_PROCESS_ID"

# PCI vendor, and the devices of v3, v4, v5p, v5e, v6e and tpu7x; Google's disks and network cards
# have others.
_GOOGLE = "0x1ae0"
_TPU_CHIPS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
_PCI_DEVICES = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Processes:
    """Which processes make up the program: `address` is host:port of process 0 (None where JAX
    finds out everything itself), `count` of them, of which this is number `id`."""

    address: str | None
    count: int | None
    id: int | None


def read_processes(
    *,
    address: str | None = None,
    count: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str],
    cpu: bool = False,
) -> Processes | None:
    """What the arguments say, or else the environment, or else the machine; None: one process.

    On a TPU (unless `cpu`) JAX finds the other hosts, unless the count is given as 1.

    Raises ValueError when some of the three are given and the others are not, or do not fit.
    """
    address = address or environment.get(ADDRESS_VARIABLE) or None
    count = _number("process count", count, environment, COUNT_VARIABLE)
    process_id = _number("process id", process_id, environment, ID_VARIABLE)
    given = {"coordinator address": address, "process count": count, "process id": process_id}
    if count == 1 and process_id in (None, 0):
        return None
    if all(value is None for value in given.values()):
        return Processes(None, None, None) if not cpu and _is_tpu_host(environment) else None
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"several processes need a coordinator address, a process count and a process id, but "
            f"{' and '.join(missing)} is not given; give --coordinator-address, --process-count "
            f"and --process-id (or {ADDRESS_VARIABLE}, {COUNT_VARIABLE} and {ID_VARIABLE})"
        )
    assert address is not None and count is not None and process_id is not None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"the coordinator address is {address!r}; it must be HOST:PORT, a free port on the "
            f"machine of process 0"
        )
    if count < 1:
        raise ValueError(f"the process count is {count}; it must be at least 1")
    if not 0 <= process_id < count:
        raise ValueError(
            f"the process id is {process_id}; with {count} processes it must be 0 to {count - 1}"
        )
    return Processes(address, count, process_id)


def _number(
    name: str, given: int | None, environment: Mapping[str, str], variable: str
) -> int | None:
    text = environment.get(variable)
    if given is not None or not text:
        return given
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the {name} in {variable} is {text!r}; it must be a number") from error


def _is_tpu_host(environment: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips that JAX may use; asked before JAX wakes up."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    if environment.get("TPU_WORKER_HOSTNAMES"):  # what GKE sets in the pods of a slice
        return True
    return any(
        vendor.read_text().strip() == _GOOGLE
        and vendor.with_name("device").read_text().strip() in _TPU_CHIPS
        for vendor in _PCI_DEVICES.glob("*/vendor")
    )
