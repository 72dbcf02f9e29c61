"""R61, R64: training that is killed again and again ends as if nothing had been.

The real command is killed with SIGKILL at thirty random moments and started again, with nothing
cleaned up in between. Some kills come while a checkpoint is being written, which the unfinished
folder proves that they leave; some hit a command that a shell could have started, the others one
that was forked off after its imports, to save time. At the end losses, sample ids, weights and
moments are those of a run that nobody touched, bit for bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.formats import checkpoint
from llama_jax.formats.checkpoint_arrays import read_group
from tests.train.command import ROOT, start, write_run
from train.metrics import read_metrics
from train.samples_log import read_samples

pytestmark = pytest.mark.compiled_quickly

STEPS, EVERY = 100, 2
KILLS, SHELL_KILLS = 30, 6
# What a run measures of the clock is not the same twice.
TIMES = ("step_seconds", "tokens_per_second")


class Forks:
    """Runs of the training command, forked off a process that has imported everything."""

    def __init__(self, cache: Path):
        environment = {
            **os.environ,
            "LLAMA_JAX_CACHE_DIR": str(cache),
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        # JAX warns of forks, which it cannot know to come before it is awake.
        command = [sys.executable, "-W", "ignore", "-m", "tests.train.forked"]
        self._server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, *arguments: str) -> int:
        """The id of the process that runs the command."""
        self._server.stdin.write(json.dumps(["train", *arguments]) + "\n")
        self._server.stdin.flush()
        word, process = self._server.stdout.readline().split()
        assert word == "started"
        return int(process)

    def wait(self) -> int:
        word, status = self._server.stdout.readline().split()
        assert word == "ended"
        return int(status)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def forks(cache):
    forks = Forks(cache)
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("chaos"),
        method="full",
        mesh={"cpu_devices": 1},
        train__steps=STEPS,
        train__batch_size=2,
        train__checkpoint_every_steps=EVERY,
        train__eval_every_steps=5,
        train__keep_checkpoints=3,
        train__keep_best=1,
    )


@dataclass
class Run:
    """What can be seen of a run from outside while it goes on."""

    folder: Path

    def lines(self) -> int:
        path = self.folder / "metrics.jsonl"
        try:
            return path.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def unfinished(self) -> set[str]:
        """The folders of saves under way, or of one that was killed."""
        root = self.folder / "checkpoints"
        names = os.listdir(root) if root.is_dir() else []
        return {name for name in names if name.startswith(".step_")}

    def is_saving(self) -> bool:
        """Whether a save is not complete yet. What is on its way to be deleted is complete."""
        root = self.folder / "checkpoints"
        return any(not (root / name / "complete.json").exists() for name in self.unfinished())

    def latest(self) -> int:
        return checkpoint.latest_step(self.folder / "checkpoints") or 0


def wait_for(condition, is_alive, seconds: float = 120) -> None:
    """Looks every half millisecond until the condition holds or the process is over."""
    deadline = time.monotonic() + seconds
    while is_alive() and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_moment(run: Run, process: int, rng: random.Random) -> None:
    """One of the moments that a kill may come at: while the run gets ready, steps or saves."""

    def alive() -> bool:
        return is_running(process)

    when = rng.choice(["start", "step", "save", "save"])
    if when == "start":
        time.sleep(rng.uniform(0, 2.0))
        return
    old, target = run.unfinished(), run.latest() + EVERY * rng.choice([0, 1, 1, 2])
    # The first thing a run does with unfinished saves is to remove them.
    wait_for(lambda: not old & run.unfinished(), alive)
    wait_for(lambda: run.lines() > target and run.latest() >= target, alive)
    if when == "save":
        wait_for(run.is_saving, alive)
    time.sleep(rng.uniform(0, 0.03))


@pytest.mark.slow
def test_r61_r64_thirty_kills_change_nothing(config, forks, cache, tmp_path):
    rng = random.Random(61)
    calm, run = tmp_path / "calm", Run(tmp_path / "killed")
    forks.start(str(config), f"output={calm}")
    assert forks.wait() == 0
    arguments = [str(config), f"output={run.folder}"]
    kills = mid_save = 0
    through_shell = set(rng.sample(range(KILLS), SHELL_KILLS))
    while kills < KILLS:
        before = run.latest()
        shell = start(config, arguments[1], cache=cache)[0] if kills in through_shell else None
        process = shell.pid if shell is not None else forks.start(*arguments)
        wait_for_moment(run, process, rng)
        if is_running(process):
            os.kill(process, signal.SIGKILL)
        if shell is not None:
            shell.communicate()
        status = forks.wait() if shell is None else shell.returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        after = run.latest()
        assert after >= before
        mid_save += run.is_saving()
        steps = [entry["step"] for entry in read_metrics(run.folder / "metrics.jsonl")]
        # What is lost: at most what came since the save before the one under way.
        assert not steps or steps[-1] - after <= 2 * EVERY
    print(f"{kills} kills, {mid_save} of them during a save, at step {run.latest()}")
    assert kills == KILLS, f"only {kills} kills before the run was over"
    assert mid_save >= 8 and run.latest() > STEPS / 4
    forks.start(*arguments)
    assert forks.wait() == 0
    same_run(run.folder, calm)
    left = [
        {path.name for path in (folder / "checkpoints").iterdir()} for folder in (run.folder, calm)
    ]
    assert left[0] == left[1]


def untimed(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name not in TIMES}


def same_run(run: Path, calm: Path) -> None:
    """Bit for bit: losses and whatever else was measured, sample ids, weights, moments."""
    a, b = read_metrics(run / "metrics.jsonl"), read_metrics(calm / "metrics.jsonl")
    assert [entry["step"] for entry in a] == list(range(1, STEPS + 1))
    for one, other in zip(a, b, strict=True):
        assert untimed(one) == untimed(other)
    assert read_samples(run / "samples.jsonl") == read_samples(calm / "samples.jsonl")
    folders = [checkpoint.step_folder(path / "checkpoints", STEPS) for path in (run, calm)]
    manifests = [checkpoint.verify(folder) for folder in folders]
    for name in ("groups", "leaves", "config", "extra"):
        assert manifests[0][name] == manifests[1][name]
    for name in manifests[0]["groups"]:
        group, other = (
            read_arrays(folder, manifest, name)
            for folder, manifest in zip(folders, manifests, strict=True)
        )
        assert group and group.keys() == other.keys()
        for path, array in group.items():
            assert np.asarray(array).tobytes() == np.asarray(other[path]).tobytes(), path


def read_arrays(folder: Path, manifest: dict, group: str) -> dict[str, jax.Array]:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=place)
        for path, entry in manifest["groups"][group].items()
    }
    return read_group(folder, manifest, group, wanted)
