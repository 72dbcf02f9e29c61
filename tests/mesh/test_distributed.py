"""Which processes there are, how they agree, and who brings which rows."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama_jax.mesh import distributed, processes
from llama_jax.mesh.distributed import WHOLE, Share, place_rows, row_share
from llama_jax.mesh.processes import Processes, read_processes
from llama_jax.mesh.sharding import batch_sharding, make_mesh
from tests.train.command import ROOT, free_port

ALL = {
    "LLAMA_JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "LLAMA_JAX_PROCESS_COUNT": "4",
    "LLAMA_JAX_PROCESS_ID": "3",
}


@pytest.fixture(autouse=True)
def no_chips(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_PCI_DEVICES", tmp_path)


def chip(folder: Path, vendor: str, device: str) -> None:
    place = folder / f"0000:00:{len(list(folder.iterdir())):02}.0"
    place.mkdir()
    (place / "vendor").write_text(f"{vendor}\n")
    (place / "device").write_text(f"{device}\n")


# Which processes


def test_one_process_is_the_rule():
    assert read_processes(environment={}) is None
    assert read_processes(environment=dict.fromkeys(ALL, "")) is None


def test_arguments_come_before_the_environment():
    assert read_processes(environment=ALL) == Processes("10.0.0.1:1234", 4, 3)
    given = read_processes(address="a:1", count=2, process_id=0, environment=ALL)
    assert given == Processes("a:1", 2, 0)
    assert read_processes(process_id=1, environment=ALL) == Processes("10.0.0.1:1234", 4, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"address": "a:1"}, "process count and process id is not given"),
        ({"count": 2}, "coordinator address and process id is not given"),
        ({"process_id": 0}, "coordinator address and process count is not given"),
        ({"address": "a", "count": 2, "process_id": 0}, "'a'; it must be HOST:PORT"),
        ({"address": ":1", "count": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"address": "a:70000", "count": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"address": "a:1", "count": 0, "process_id": 0}, "count is 0; it must be at least 1"),
        ({"address": "a:1", "count": 2, "process_id": 2}, "id is 2; with 2 processes .* 0 to 1"),
        ({"address": "a:1", "count": 2, "process_id": -1}, "must be 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_processes(environment={}, **given)


def test_a_number_that_is_none_is_named():
    with pytest.raises(ValueError, match="LLAMA_JAX_PROCESS_COUNT is 'two'"):
        read_processes(environment={**ALL, "LLAMA_JAX_PROCESS_COUNT": "two"})


def test_on_a_tpu_jax_finds_the_others(tmp_path):
    found = Processes(None, None, None)
    chip(tmp_path, "0x1ae0", "0x0042")  # Google's network card
    chip(tmp_path, "0x10de", "0x0063")
    assert read_processes(environment={}) is None
    chip(tmp_path, "0x1ae0", "0x0063")
    assert read_processes(environment={}) == found
    assert read_processes(environment={"JAX_PLATFORMS": "tpu,cpu"}) == found
    assert read_processes(environment={"JAX_PLATFORMS": "cpu"}) is None
    assert read_processes(environment={}, cpu=True) is None
    assert read_processes(environment={"LLAMA_JAX_PROCESS_COUNT": "1"}) is None
    assert read_processes(count=1, environment={}) is None
    assert read_processes(environment=ALL) == Processes("10.0.0.1:1234", 4, 3)


def test_in_a_pod_of_gke_too():
    assert read_processes(environment={"TPU_WORKER_HOSTNAMES": "a,b"}) is not None
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}
    assert read_processes(environment=hosts) is None


# Agreement


def test_one_process_agrees_with_itself():
    assert distributed.is_main()
    assert distributed.exchange("x", "mine") == ["mine"]
    assert distributed.run_on_main("x", lambda: [1, "a"]) == [1, "a"]
    distributed.barrier("x")
    with pytest.raises(KeyError, match="lost"), distributed.all_or_none("x"):
        raise KeyError("lost")


PAIR = """
import sys
import jax
from llama_jax.mesh import distributed
from llama_jax.mesh.processes import Processes
jax.config.update("jax_cpu_collectives_implementation", "gloo")
me = int(sys.argv[2])
distributed.join(Processes(sys.argv[1], 2, me))
assert distributed.is_main() == (me == 0)
assert distributed.exchange("names", f"process {me}") == ["process 0", "process 1"]
assert distributed.run_on_main("where", lambda: jax.process_index()) == 0
for culprit in (0, 1):
    try:
        with distributed.all_or_none("work"):
            if me == culprit:
                raise OSError("disk full")
    except OSError as error:
        assert me == culprit
    except distributed.ProcessError as error:
        assert me != culprit and str(error) == f"process {culprit}: disk full"
    else:
        raise AssertionError("nobody was told")
try:
    distributed.run_on_main("work", lambda: 1 / 0)
except ZeroDivisionError:
    assert me == 0
except distributed.ProcessError as error:
    assert me == 1 and "process 0: division by zero" in str(error)
if me == 1:
    sys.exit(0)
try:
    distributed.exchange("nobody comes", timeout_seconds=0.5)
except distributed.ProcessError as error:
    assert "did not reach 'nobody comes'" in str(error)
else:
    raise AssertionError("it came")
"""


def run_script(script: str, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_two_processes_agree_on_values_and_errors():
    address = f"127.0.0.1:{free_port()}"
    pair = [run_script(PAIR, address, str(number)) for number in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors


def test_joining_after_jax_has_begun_is_an_error():
    jax.devices()
    with pytest.raises(RuntimeError, match=r"process 1 of 2 and the coordinator at a:1 did not"):
        distributed.join(Processes("a:1", 2, 1))


# Rows


class Device(NamedTuple):
    process_index: int
    number: int


def fake(*owners: tuple[int, slice]) -> SimpleNamespace:
    """A sharding over devices, of which each belongs to a process and holds rows."""
    devices = {
        Device(process, number): (rows, slice(None))
        for number, (process, rows) in enumerate(owners)
    }
    return SimpleNamespace(devices_indices_map=lambda shape: devices)


@pytest.mark.parametrize(
    ("owners", "shares"),
    [
        # Each process has rows of its own, in one block or in two that touch.
        ([(0, slice(0, 4)), (1, slice(4, 8))], [Share(0, 2), Share(1, 2)]),
        (
            [(0, slice(0, 2)), (0, slice(2, 4)), (1, slice(4, 6)), (1, slice(6, 8))],
            [Share(0, 2), Share(1, 2)],
        ),
        # The second process has the first rows.
        ([(1, slice(0, 4)), (0, slice(4, 8))], [Share(1, 2), Share(0, 2)]),
        # Tensors over processes: pairs of them need the same rows, or all need all.
        (
            [(0, slice(0, 4)), (1, slice(0, 4)), (2, slice(4, 8)), (3, slice(4, 8))],
            [Share(0, 2), Share(0, 2), Share(1, 2), Share(1, 2)],
        ),
        ([(0, slice(None)), (1, slice(None))], [Share(0, 1), Share(0, 1)]),
        # Rows in turns, or of different number: no part of the batch is one process's.
        (
            [(0, slice(0, 2)), (1, slice(2, 4)), (0, slice(4, 6)), (1, slice(6, 8))],
            [WHOLE, WHOLE],
        ),
        ([(0, slice(0, 6)), (1, slice(6, 8))], [WHOLE, WHOLE]),
    ],
)
def test_each_process_brings_what_its_devices_hold(owners, shares, monkeypatch):
    for index, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert row_share(fake(*owners), (8, 3)) == share
    assert Share(1, 4).rows(8) == slice(2, 4)


def test_rows_go_to_the_devices_that_hold_them():
    place = batch_sharding(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert row_share(place, (8, 3)) == WHOLE
    rows = np.arange(24).reshape(8, 3)
    placed = place_rows({"a": rows}, place)["a"]
    assert placed.sharding == place and np.array_equal(placed, rows)


def test_rows_of_several_processes_make_one_array(monkeypatch):
    """As each of two processes would, though one process holds all devices here: those that ask
    for rows of the other fail, so only its own are asked for."""
    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    place = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    asked = []

    def collect(shape, sharding, read):
        assert shape == (8, 3) and sharding is place
        asked.append(read((slice(4, 8), slice(None))))

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_callback", collect)
    rows = np.arange(24).reshape(8, 3)
    place_rows(rows[4:], place, Share(1, 2))
    assert np.array_equal(asked[0], rows[4:])
