"""The command `launch`: its answers, its refusals, and that a dry run touches nothing."""

import json
import shlex

import pytest
import yaml

from llama_jax import cli
from tests.train.launch.cloud import Cloud

WHERE = ["--project", "my-project", "--zone", "us-west4-a"]
CONFIG = ["tiny-lora-cpu.yaml", "output=gs://bucket/runs/a", "train.batch_size=128"]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    """Between two looks at a cloud that answers at once."""
    monkeypatch.setattr("train.launch.tpu_vm._POLL_SECONDS", 0.1)


def launch(capsys, *words, code=0):
    assert cli.main(["launch", *words]) == code
    return capsys.readouterr()


def test_a_dry_run_prints_what_can_be_pasted_and_calls_nothing(
    capsys, tmp_path, monkeypatch
) -> None:
    cloud = Cloud(tmp_path / "cloud", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-seen")
    rows = tmp_path / "my rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    options = ["--slice", "2xv5p-64", "--spot", "--dry-run", "--forward", "WANDB_API_KEY"]
    shown = launch(capsys, *CONFIG, f"data.train={rows}", *WHERE, *options)
    assert "not-to-be-seen" not in shown.out + shown.err
    assert "# 2xv5p-64: 128 chips, 4x4x4, 32 workers; run folder gs://bucket/runs/a" in shown.out
    assert cloud.calls() == [] and {each.name for each in tmp_path.iterdir()} == {
        "cloud",
        "my rows.jsonl",
    }
    start = shown.out.index("\nmkdir -p")
    commands = [line for line in shown.out[start:].splitlines() if line and line[0] != "#"]
    words = [shlex.split(line) for line in commands]
    steps = [" ".join(each[3:5]) if each[0] == "gcloud" else each[0] for each in words]
    assert [step for step in steps if step.split()[-1] in ("create", "scp", "delete")] == [
        "queued-resources create",
        "queued-resources scp",
        "queued-resources delete",
    ]
    folder = "launch/tiny-lora-cpu"
    made = words.index(["mkdir", "-p", f"{folder}/copied"])
    assert made < words.index(["cp", "-rL", "--", str(rows), f"{folder}/copied/0-my rows.jsonl"])
    create = next(each for each in words if "create" in each)
    assert "--accelerator-type=v5p-128" in create and "--node-count=2" in create
    copied = next(each for each in words if "scp" in each)
    assert {"launch/tiny-lora-cpu", "tiny-lora-cpu:llama-jax/", "--worker=all"} <= set(copied)
    for file in ("config.json", "job.env", "environment.sh", "worker.sh", "forwarded.sh"):
        assert f"# file launch/tiny-lora-cpu/{file}:" in shown.out


def test_the_commands_of_a_dry_run_are_those_of_a_real_one(capsys, tmp_path, monkeypatch) -> None:
    cloud = Cloud(tmp_path / "cloud", monkeypatch, hosts=4, waits=1)
    wheel = tmp_path / "llama_jax-1-py3-none-any.whl"
    wheel.write_bytes(b"")
    options = [*WHERE, "--slice", "v5e-16", "--package", str(wheel), "--json"]
    dry = json.loads(launch(capsys, *CONFIG, *options, "--dry-run").out)
    real = json.loads(launch(capsys, *CONFIG, *options).out)
    assert (real["state"], real["attempts"], real["deleted"]) == ("done", 1, True)
    assert (real["slice"], real["chips"], real["topology"]) == ("v5e-16", 16, "4x4")

    def steps(calls):
        """The kinds of commands, waiting left out, with what is done on workers."""
        last = [(call[3], call[-1].partition("worker.sh ")[2].split("'")[0]) for call in calls]
        return [each for each in last if each[0] != "describe"]

    written = [shlex.split(line) for line in dry["commands"] if line.startswith("gcloud")]
    wanted = steps([each[1:] for each in written])
    assert [each for each in steps(cloud.calls()) if "follow" not in each[1]] == [
        each for each in wanted if "follow" not in each[1]
    ]


def test_status_logs_stop_delete(capsys, tmp_path, monkeypatch) -> None:
    cloud = Cloud(tmp_path / "cloud", monkeypatch, hosts=1)
    cloud.training('trap "echo saved; exit 0" TERM; echo step 1; while :; do sleep 0.1; done')
    name = ["tiny-lora-cpu.yaml", *WHERE]
    assert launch(capsys, *name, "--status").out == "tiny-lora-cpu: absent\n"
    wheel = tmp_path / "llama_jax-1-py3-none-any.whl"
    wheel.write_bytes(b"")
    started = [*CONFIG, *WHERE, "--slice", "v5e-4", "--package", str(wheel), "--detach"]
    assert "started after 1 starts; machines kept" in launch(capsys, *started).out
    assert launch(capsys, *name, "--status").out == ("tiny-lora-cpu: ACTIVE\n  worker-0: running\n")
    monkeypatch.setattr("llama_jax.commands.launch_machines._LOG_SECONDS", 1)
    assert launch(capsys, *name, "--logs").out == "step 1\n"
    assert "worker-0: exited with 0" in launch(capsys, *name, "--stop").out
    assert launch(capsys, *name, "--logs").out == "step 1\nsaved\n"
    assert launch(capsys, *name, "--delete").out == "tiny-lora-cpu: deleted\n"
    assert launch(capsys, *name, "--delete").out == "tiny-lora-cpu: there was none\n"
    assert cloud.request is None
    for action in ("--status", "--logs", "--stop", "--delete"):
        dry = launch(capsys, *name, action, "--dry-run")
        assert "gcloud compute tpus queued-resources" in dry.out


def test_a_failed_training_and_a_failed_launch_exit_with_1(capsys, tmp_path, monkeypatch) -> None:
    cloud = Cloud(tmp_path / "cloud", monkeypatch, hosts=1)
    cloud.training("echo oh; exit 1")
    wheel = tmp_path / "llama_jax-1-py3-none-any.whl"
    wheel.write_bytes(b"")
    words = [*CONFIG, *WHERE, "--slice", "v5e-4", "--package", str(wheel)]
    assert "failed after 1 starts" in launch(capsys, *words, code=1).out
    cloud = Cloud(tmp_path / "other", monkeypatch, create_errors=["PERMISSION_DENIED: no"])
    shown = launch(capsys, *words, code=1).err
    assert "roles/tpu.admin" in shown and "--delete removes" not in shown, "nothing was made"


def test_ctrl_c_ends_the_watching_and_says_what_stays(capsys, tmp_path, monkeypatch) -> None:
    cloud = Cloud(tmp_path / "cloud", monkeypatch, hosts=1)
    wheel = tmp_path / "llama_jax-1-py3-none-any.whl"
    wheel.write_bytes(b"")

    def interrupted(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.launch.workers.Workers.log", interrupted)
    words = [*CONFIG, *WHERE, "--slice", "v5e-4", "--package", str(wheel)]
    shown = launch(capsys, *words, code=130).err
    assert "--name=tiny-lora-cpu --project=my-project" in shown and "--delete removes" in shown
    assert cloud.request is not None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([*CONFIG, *WHERE], "--slice is missing"),
        ([*CONFIG, "--slice", "v5e-4", "--zone", "us-west4-a"], "--project is missing"),
        ([*CONFIG, *WHERE, "--slice", "v5e-5"], "no v5e slice of 5 chips"),
        ([*CONFIG, "mesh.fsdp=7", *WHERE, "--slice", "v5p-64"], "cannot be formed by the 64"),
        ([*CONFIG, *WHERE, "--slice", "tpu7x-64"], "launch with --gke"),
        (["tiny-lora-cpu.yaml", *WHERE, "--slice", "v5e-4"], "output=gs://BUCKET/runs/tiny-lora"),
        ([*CONFIG, *WHERE, "--slice", "v5e-4", "--image", "a"], "--image means nothing without"),
        ([*CONFIG, *WHERE, "--slice", "v5e-4", "--namespace", "a"], "--namespace means nothing"),
        ([*CONFIG, "--gke", "--slice", "v5e-4"], "--gke needs --image"),
        ([*CONFIG, "--gke", "--slice", "v5e-4", "--image", "a", "--keep"], "--keep means nothing"),
        ([*CONFIG, "--gke", "--image", "a", "--wait", "6h"], "--wait means nothing on GKE"),
        ([*CONFIG, "--gke", "--image", "a", "--package", "checkout"], "--package means nothing"),
        ([*CONFIG, *WHERE, "--slice", "v5e-4", "--wait", "long"], "--wait 'long' is not a dur"),
        *(
            ([*CONFIG, *WHERE, "--slice", "v5e-4", flag, " "], f"{flag} is empty; give it a value")
            for flag in ("--name", "--env", "--runtime-version", "--service-account", "--forward")
        ),
        ([*CONFIG, *WHERE, "--slice", "v5e-4", "--env", "=x"], "'' is no name of a variable"),
        ([*CONFIG, *WHERE, "--slice", "v5e-4", "--env", "x"], "NAME=VALUE, such as"),
        ([*CONFIG, "--gke", "--slice", "v5e-4", "--image", "a", "--manifest", ""], "--manifest is"),
        ([*CONFIG, "--gke", "--slice", "v5e-4", "--image", "a", "--manifest", "/"], "is a folder"),
        ([*CONFIG, *WHERE, "--slice", "v5e-4", "--retries", "-1"], "--retries must be 0 or more"),
        ([*CONFIG, "train.stpes=3", *WHERE, "--slice", "v5e-4"], "stpes"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_called(
    capsys, tmp_path, monkeypatch, words, complaint
) -> None:
    cloud = Cloud(tmp_path / "cloud", monkeypatch)
    assert complaint in launch(capsys, *words, code=2).err
    assert cloud.calls() == []


def test_a_manifest_is_written_and_applied(capsys, tmp_path, monkeypatch) -> None:
    cloud = Cloud(tmp_path / "cloud", monkeypatch)
    kubectl = cloud.root / "bin/kubectl"
    kubectl.write_text('#!/bin/bash\necho "$@" >"$FAKE_CLOUD/kubectl"\n[ ! -f "$FAKE_CLOUD/no" ]\n')
    kubectl.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    words = [*CONFIG, "--gke", "--slice", "tpu7x-64", "--image", "img", "--name", "big"]
    assert "kubectl apply -f deploy/big.yaml" in launch(capsys, *words).out
    text = (tmp_path / "deploy/big.yaml").read_text()
    kinds = [each["kind"] for each in yaml.safe_load_all(text)]
    assert kinds == ["ConfigMap", "JobSet"] and not (cloud.root / "kubectl").exists()
    assert "applied deploy/big.yaml" in launch(capsys, *words, "--apply").out
    assert (cloud.root / "kubectl").read_text() == "apply -f deploy/big.yaml\n"
    (cloud.root / "no").touch()
    assert (
        "kubectl apply -f deploy/big.yaml failed" in launch(capsys, *words, "--apply", code=1).err
    )
