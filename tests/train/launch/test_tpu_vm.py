"""A launch from nothing to the end, against a cloud of folders in which the real worker script
runs: creation, waiting, failures, preemption, secrets."""

import json
import stat

import pytest

from llama_jax.commands.run_config import find_config
from llama_jax.mesh.slices import slice_named
from train.config import load_run_config
from train.interrupt import EXIT_CODE
from train.launch import queued
from train.launch.gcloud import CommandError, Shell
from train.launch.package import read_package
from train.launch.places import place
from train.launch.plan import Machines, Target
from train.launch.secrets import Redactor, read_environment
from train.launch.staging import Cargo
from train.launch.tpu_vm import RESUME_CODES, TpuVmJob

from .cloud import Cloud


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return lambda **script: Cloud(tmp_path / "cloud", monkeypatch, **script)


def make_job(tmp_path, *overrides, slice_name="v5e-32", tier="spot", environment=None, **options):
    """A v5e-32 has eight workers; the cloud of a test says how many it really gives."""
    wheel = tmp_path / "llama_jax-1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    run = load_run_config(
        find_config("tiny-lora-cpu.yaml"), ["output=gs://bucket/runs/a", *overrides]
    )
    machines = Machines(
        Target("job", "my-project", "us-west4-a"),
        slice_named(slice_name),
        tier=tier,
        runtime_version="v2-alpha-tpuv5-lite",
        wait_seconds=options.pop("wait_seconds", 3600),
    )
    said, log = [], []
    now = iter(range(0, 10**9, 10))
    job = TpuVmJob(
        machines=machines,
        cargo=Cargo(
            place(run, may_copy=True),
            environment or read_environment(plain=[], secrets=[], forward=[], local={}),
            read_package(str(wheel)),
        ),
        runner=Shell(said.append),
        redact=Redactor(list(environment.forwarded.values()) if environment else []),
        show=log.append,
        clock=lambda: next(now),
        sleep=lambda seconds: None,
        **{"retries": 3, "keep": False, "detach": False, **options},
    )
    job.said, job.log = said, log
    return job


@pytest.fixture
def job(tmp_path):
    return lambda *overrides, **options: make_job(tmp_path, *overrides, **options)


def test_created_installed_trained_followed_and_deleted(cloud, job, tmp_path):
    there = cloud(hosts=2, waits=3)
    there.training("echo step 1; sleep 1; echo step 2")
    launched = job(slice_name="2xv5e-8", keep=True)
    outcome = launched.run()
    assert (outcome.state, outcome.attempts, outcome.deleted) == ("done", 1, False)
    assert launched.log == ["step 1", "step 2"]

    (create,) = there.calls("create")
    assert {
        "--project=my-project",
        "--zone=us-west4-a",
        "--accelerator-type=v5litepod-8",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--valid-until-duration=3600s",
        "--node-count=2",
        "--node-prefix=job",
        "--spot",
    } <= set(create)
    for number in (0, 1):
        home = there.worker(number)
        folder = home / "llama-jax" / "job"
        programs = (home / "programs").read_text().splitlines()
        mount = f"--implicit-dirs --rename-dir-limit=200000 bucket {tmp_path}/cloud/mounted/bucket"
        wheel = f"{folder}/llama_jax-1.0-py3-none-any.whl"
        assert programs == [
            f"gcsfuse {mount}",
            f"pip install --quiet {wheel}[tpu,demo]",
            f"pip install --quiet --force-reinstall --no-deps {wheel}",
        ]
        assert (home / "trained").read_text() == f"train {folder}/config.json\n"
        config = json.loads((folder / "config.json").read_text())
        assert config["output"] == f"{tmp_path}/cloud/mounted/bucket/runs/a"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        # The log is also where the machine's end does not reach.
        kept = tmp_path / f"cloud/mounted/bucket/runs/a/logs/worker-{number}.log"
        assert kept.read_text() == "step 1\nstep 2\n"

    # Once more with the same name: the machines and what is installed are used again.
    outcome = job(slice_name="2xv5e-8").run()
    assert outcome.deleted and there.request is None
    assert len(there.calls("create")) == 1
    assert not there.worker(0).exists()


def test_a_slice_that_is_taken_away_is_made_again_and_training_goes_on(cloud, job):
    there = cloud(hosts=1, preemptions=2)
    # Only the third machine has the time.
    there.training('echo start; [ -f "$FAKE_CLOUD/go" ] || sleep 60; echo end')
    launched = job(slice_name="v5e-4")
    seen = []

    def note(text):
        seen.append(text)
        if sum("bringing it up again" in each for each in seen) == 2:
            (there.root / "go").touch()

    launched.runner = Shell(note)
    outcome = launched.run()
    assert (outcome.state, outcome.attempts) == ("done", 3)
    assert launched.log == ["start", "start", "start", "end"]
    kinds = [" ".join(each[2:4]) for each in there.calls()]
    changes = [kind for kind in kinds if kind.endswith(("create", "delete"))]
    assert changes == ["queued-resources create", "queued-resources delete"] * 3
    assert "job is SUSPENDED: away with it" in seen
    assert not launched.holds


def test_preempted_too_often(cloud, job):
    there = cloud(hosts=1, preemptions=9)
    there.training("sleep 60")
    with pytest.raises(CommandError, match="was taken away or broke 2 times; see the logs"):
        job(slice_name="v5e-4", retries=1).run()
    assert len(there.calls("create")) == 2


def test_training_that_fails_is_reported_with_its_code_and_not_repeated(cloud, job):
    there = cloud(hosts=2)
    there.training('[ "$FAKE_HOST" = worker-0 ] && exit 0; echo no; exit 2')
    launched = job(slice_name="2xv5e-4")
    outcome = launched.run()
    assert (outcome.state, outcome.exit_code, outcome.attempts) == ("failed", 2, 1)
    assert outcome.deleted


def test_a_worker_that_saved_on_a_signal_is_started_again_on_machines_that_stay(cloud, job):
    assert EXIT_CODE in RESUME_CODES
    there = cloud(hosts=1)
    there.training('[ -f "$FAKE_CLOUD/once" ] && exit 0; touch "$FAKE_CLOUD/once"; exit 75')
    outcome = job(slice_name="v5e-4").run()
    assert (outcome.state, outcome.attempts) == ("done", 2)
    assert len(there.calls("create")) == 1


def test_failed_while_the_machines_were_repaired_counts_as_broken(cloud, job):
    there = cloud(hosts=1, node_states=["REPAIRING", "RESTARTING", "READY"])
    there.training('[ -f "$FAKE_CLOUD/once" ] && exit 0; touch "$FAKE_CLOUD/once"; exit 1')
    launched = job(slice_name="v5e-4")
    assert (launched.run().state, len(there.calls("create"))) == ("done", 1)
    assert "job is being repaired: REPAIRING" in launched.said


def test_nodes_that_are_gone_under_an_active_request_are_asked_for_again(cloud, job):
    there = cloud(hosts=1, node_states=["PREEMPTED"])
    there.training('[ -f "$FAKE_CLOUD/once" ] && exit 0; touch "$FAKE_CLOUD/once"; exit 1')
    with pytest.raises(CommandError, match="taken away or broke 1 times"):
        job(slice_name="v5e-4", retries=0).run()


def test_workers_that_fall_silent_on_machines_that_are_well_are_not_given_up(cloud, job):
    there = cloud(hosts=1, mute=True)
    there.training('touch "$FAKE_CLOUD/mute"; sleep 30')
    launched = job(slice_name="v5e-4")
    with pytest.raises(CommandError, match="its workers do not answer; training may still run"):
        launched.run()
    assert there.request is not None and launched.holds
    (there.root / "mute").unlink()
    queued.delete(launched.runner, launched.target, launched.redact)


def test_new_machines_may_take_a_while_to_let_us_in(cloud, job):
    there = cloud(hosts=1, ssh_failures=3)
    assert job(slice_name="v5e-4").run().state == "done"
    assert len(there.calls("ssh")) >= 4


QUOTA = (
    "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded"
)
ERRORS = {
    "quota": (QUOTA, "Quotas page of the Cloud console"),
    "permission": (
        "PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied",
        "roles/tpu.admin",
    ),
    "disabled": (
        "HTTPError 403: Cloud TPU API has not been used in project 12 before or it is disabled",
        "gcloud services enable tpu.googleapis.com",
    ),
    "login": ("You do not currently have an active account selected.", "gcloud auth login"),
    "offer": ("INVALID_ARGUMENT: invalid accelerator_type", "accelerator-types list --zone"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_what_gcloud_refuses_is_explained(cloud, job, kind):
    said, advice = ERRORS[kind]
    there = cloud(create_errors=[said])
    launched = job()
    with pytest.raises(CommandError) as error:
        launched.run()
    assert error.value.kind == kind
    assert advice in str(error.value) and said.rstrip(".") in str(error.value)
    assert there.request is None and not there.calls("ssh")
    assert not launched.holds


def test_a_request_that_fails_is_removed_and_its_reason_told(cloud, job):
    there = cloud(hosts=1, fail_reason=QUOTA)
    with pytest.raises(CommandError, match="job is FAILED: RESOURCE_EXHAUSTED.*Quotas page"):
        job().run()
    assert there.request is None and len(there.calls("create")) == 1


def test_waiting_ends_and_leaves_no_request_behind(cloud, job):
    there = cloud(hosts=1, waits=10**6)
    with pytest.raises(CommandError, match="no v5e-32 came within 100 seconds"):
        job(wait_seconds=100).run()
    assert there.request is None


def test_a_request_of_the_same_name_for_other_machines_is_left_alone(cloud, job):
    there = cloud(hosts=1)
    job(slice_name="v5e-4", keep=True).run()
    with pytest.raises(ValueError, match="1 × v5litepod-4, spot, not 1 × v5litepod-8, spot"):
        job(slice_name="v5e-8").run()
    with pytest.raises(ValueError, match="is 1 × v5litepod-4, spot, not 1 × v5litepod-4, not spot"):
        job(slice_name="v5e-4", tier="on-demand").run()
    assert there.request is not None


def test_detached_then_watched_and_another_config_is_refused(cloud, job):
    there = cloud(hosts=1)
    there.training('echo one; while [ ! -f "$FAKE_CLOUD/go" ]; do sleep 0.1; done; echo two')
    outcome = job(slice_name="v5e-4", detach=True).run()
    assert (outcome.state, outcome.deleted) == ("started", False)
    with pytest.raises(CommandError, match="job is training with another config; stop it first"):
        job("train.steps=39", slice_name="v5e-4").run()
    said = []

    def note(text):
        said.append(text)
        if text == "training is under way already":
            (there.root / "go").touch()

    watching = job(slice_name="v5e-4", keep=True)
    watching.runner = Shell(note)
    assert watching.run().state == "done"
    assert watching.log == ["one", "two"], "the log is shown from its start"
    late = job(slice_name="v5e-4")
    assert late.run().deleted and late.log == ["one", "two"]
    assert "training has ended already" in late.said
    assert len(there.calls("scp")) == 1


def test_a_run_folder_on_the_machines_own_disk_is_refused(cloud, job):
    there = cloud(hosts=1)
    there.filesystem("ext4")
    with pytest.raises(CommandError, match="lies on this machine's own disk .ext4."):
        job(f"output={there.root}/shared", slice_name="v5e-4").run()
    there.filesystem("nfs4")
    launched = job(f"output={there.root}/shared", slice_name="v5e-4")
    assert launched.run().state == "done"
    assert (there.root / "shared/logs/worker-0.log").is_file()


def test_local_files_travel_and_training_starts_beside_them(cloud, job, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    there = cloud(hosts=1)
    there.training("cat copied/0-rows.jsonl; test -f copied/1-rows.jsonl")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/rows.jsonl").write_text("{}")
    launched = job(
        f"data.train={rows}",
        f"data.eval={tmp_path}/other/rows.jsonl",
        slice_name="v5e-4",
        keep=True,
    )
    outcome = launched.run()
    assert launched.log == ['{"text": "a"}'] and outcome.state == "done"
    config = json.loads((there.worker(0) / "llama-jax/job/config.json").read_text())
    assert config["data"]["train"] == ["./copied/0-rows.jsonl"]


SECRET = "w4ndb-very-secret-value"


def test_secrets_reach_training_and_nothing_else(cloud, job, capfd):
    environment = read_environment(
        plain=["JAX_LOG=it's 1"],
        secrets=["HF_TOKEN=hf-token"],
        forward=["WANDB_API_KEY"],
        local={"WANDB_API_KEY": SECRET},
    )
    there = cloud(hosts=1)
    there.training('echo "key $WANDB_API_KEY"; echo "$HF_TOKEN" >"$HOME/fetched"')
    launched = job(slice_name="v5e-4", keep=True, environment=environment)
    launched.run()
    home = there.worker(0)
    assert f"WANDB_API_KEY={SECRET}" in (home / "environment").read_text().splitlines()
    assert "JAX_LOG=it's 1" in (home / "environment").read_text().splitlines()
    assert (home / "fetched").read_text() == "value-of-hf-token\n"
    assert stat.S_IMODE((home / "llama-jax/job/forwarded.sh").stat().st_mode) == 0o600
    everything = json.dumps(there.calls()) + "".join(launched.said) + "".join(capfd.readouterr())
    assert SECRET not in everything
    assert launched.log == ["key ***"]
    assert SECRET not in repr(launched.cargo)


def test_a_worker_whose_secret_cannot_be_fetched_does_not_train_without(cloud, job):
    there = cloud(hosts=1)
    environment = read_environment(plain=[], secrets=["A=b:7"], forward=[], local={})
    outcome = job(slice_name="v5e-4", keep=True, environment=environment).run()
    assert outcome.state == "failed" and outcome.exit_code
    assert not (there.worker(0) / "trained").exists()
