"""worker.sh by itself: which package it installs, and how it stops."""

import json
import os
import shlex
import signal
import subprocess
import time
from importlib import resources

import pytest

from train.launch.workers import parse_states

from .cloud import Cloud


@pytest.fixture
def worker(tmp_path, monkeypatch):
    cloud = Cloud(tmp_path / "cloud", monkeypatch)
    folder = tmp_path / "home/llama-jax/job"
    folder.mkdir(parents=True)
    (folder / "worker.sh").write_text((resources.files("train.launch") / "worker.sh").read_text())
    (folder / "environment.sh").write_text("")
    (folder / "config.json").write_text(json.dumps({}))
    values = {
        "PACKAGE": "llama-jax==1.0",
        "EXTRAS": "tpu",
        "BUCKETS": "",
        "MOUNT_ROOT": str(tmp_path / "mounted"),
        "OUTPUT": str(tmp_path / "runs"),
        "CONFIG_ID": "abc",
    }

    def call(*words, code=0, **changes):
        text = "".join(f"{k}={shlex.quote(v)}\n" for k, v in {**values, **changes}.items())
        (folder / "job.env").write_text(text)
        done = subprocess.run(
            ["bash", folder / "worker.sh", *words],
            env=os.environ | {"HOME": str(tmp_path / "home"), "FAKE_HOST": "w-0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    call.folder, call.home, call.cloud = folder, tmp_path / "home", cloud
    return call


@pytest.mark.parametrize(
    ("package", "asked"),
    [
        ("llama-jax==1.0", "llama-jax[tpu]==1.0"),
        ("llama-jax", "llama-jax[tpu]"),
        ("llama_jax>=1,<2", "llama_jax[tpu]>=1,<2"),
        ("llama-jax[serve]==1.0", "llama-jax[tpu,serve]==1.0"),
        ("llama-jax @ https://example.org/a.whl", "llama-jax[tpu] @ https://example.org/a.whl"),
    ],
)
def test_a_requirement_gets_the_extras(worker, package, asked):
    worker("install", PACKAGE=package)
    assert (worker.home / "programs").read_text() == f"pip install --quiet {asked}\n"


def test_what_is_installed_is_installed_once_and_a_new_wheel_of_the_same_name_again(worker):
    wheel = worker.folder / "a-1.whl"
    wheel.write_text("one")
    for _ in range(2):
        worker("install", PACKAGE="a-1.whl")
    assert (worker.home / "programs").read_text().count("--force-reinstall") == 1
    wheel.write_text("two")
    worker("install", PACKAGE="a-1.whl")
    assert (worker.home / "programs").read_text().count("--force-reinstall") == 2


def test_stopping_lets_training_save_and_start_again_keeps_the_earlier_log(worker):
    saving = 'trap "echo saving; sleep 1; echo saved; exit 75" TERM'
    worker.cloud.training(f"{saving}; echo up; while :; do sleep 0.1; done")
    worker("install")
    worker("start")
    assert "running abc" in worker("status")
    assert "already running" in worker("start")
    until(lambda: "up" in (worker.folder / "train.log").read_text())
    worker("stop", "30")
    (state,) = parse_states(worker("status"))
    assert (state.host, state.state, state.exit_code) == ("w-0", "exited", 75)
    assert worker("follow", "2", "5") == "| saving\n| saved\n"
    worker.cloud.training("exit 0")
    worker("start")
    until(lambda: "exited:0" in worker("status"))
    assert (worker.folder / "earlier.log").read_text() == "up\nsaving\nsaved\n"
    logs = worker.home.parent / "runs/logs/w-0.log"
    assert logs.read_text() == "up\nsaving\nsaved\n", "the log outlives the machine"


def test_training_that_does_not_stop_is_said_to_run_on(worker):
    worker.cloud.training('trap "" TERM; echo up; while :; do sleep 0.1; done')
    worker("install")
    worker("start")
    until(lambda: "up" in (worker.folder / "train.log").read_text())
    try:
        assert "still running after 1 seconds" in worker("stop", "1", code=1)
        assert "running" in worker("status")
    finally:
        os.killpg(int((worker.folder / "pid").read_text()), signal.SIGKILL)
    until(lambda: "lost" in worker("status"))


def test_a_machine_that_was_restarted_has_lost_its_training(worker):
    worker.cloud.training("sleep 30")
    worker("install")
    worker("start")
    pid = int((worker.folder / "pid").read_text())
    (worker.folder / "boot").write_text("another boot")
    assert "lost" in worker("status")
    os.killpg(pid, signal.SIGKILL)


def test_before_anything_and_after_nonsense(worker):
    assert "absent" in worker("status")
    assert worker("follow", "1", "1") == ""
    worker("stop", "1")
    assert "unknown: dance" in worker("dance", code=1)


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
