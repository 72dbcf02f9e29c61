"""Manifests for GKE: they follow the published schemas and say what each slice needs."""

import json

import pytest
import yaml

from llama_jax.commands.run_config import find_config
from llama_jax.mesh.slices import slice_named
from train.config import RunConfig, load_run_config
from train.launch.jobset import ClusterJob, manifest, read_cluster_secret
from train.launch.places import place

from .jobset_schema import CONFIG_MAP, JOB_SET, problems


def make(slice_name, *overrides, **options):
    run = load_run_config(
        find_config("tiny-lora-cpu.yaml"),
        ["output=gs://bucket/runs/a", "model.name=gs://models/llama", *overrides],
    )
    placed = place(run, may_copy=False)
    job = ClusterJob("job", slice_named(slice_name), placed, image="img:1", **options)
    return list(yaml.safe_load_all(manifest(job)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"namespace": "Bad NS"}, "--namespace 'Bad NS' must be"),
        ({"namespace": "a.b"}, "--namespace 'a.b' must be"),
        ({"namespace": "n" * 64}, "must be .* at most 63 characters"),
        ({"queue": "Q Q"}, "--queue 'Q Q' must be"),
        ({"queue": "a..b"}, "--queue 'a..b' must be"),
        ({"queue": "q." * 31 + "qq"}, "must be .* 63 characters at most"),
        ({"service_account": "a b"}, "--service-account 'a b' must be"),
        ({"image": "a b"}, "--image 'a b' is no name"),
        (
            {"environment": {"X": "1"}, "secrets": [read_cluster_secret("X=a/b")]},
            "X is set twice",
        ),
        (
            {"secrets": [read_cluster_secret("X=a/b"), read_cluster_secret("X=c/d")]},
            "X is set twice",
        ),
    ],
)
def test_names_that_a_cluster_refuses_are_refused(options, said):
    run = load_run_config(find_config("tiny-lora-cpu.yaml"), ["output=gs://b/r"])
    placed = place(run, may_copy=False)
    with pytest.raises(ValueError, match=said):
        ClusterJob("job", slice_named("v5e-4"), placed, **{"image": "img:1", **options})


def test_names_of_pods_fit_in_a_label():
    placed = place(
        load_run_config(find_config("tiny-lora-cpu.yaml"), ["output=gs://b/r"]), may_copy=False
    )
    # JobSet's webhook: NAME-slice-1-63-abcde.
    ClusterJob("a" * 46, slice_named("2xv5e-256"), placed, image="img:1")
    with pytest.raises(
        ValueError, match="has 47 characters.* for 2xv5e-256 give one of at most 46"
    ):
        ClusterJob("a" * 47, slice_named("2xv5e-256"), placed, image="img:1")


def pod_of(job_set):
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


# accelerator, topology, hosts and chips a host, from
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
SLICES = {
    "v4-8": ("tpu-v4-podslice", "2x2x2", 2, 4),
    "v4-64": ("tpu-v4-podslice", "4x4x4", 16, 4),
    "v5e-1": ("tpu-v5-lite-podslice", "1x1", 1, 1),
    "v5e-4": ("tpu-v5-lite-podslice", "2x2", 1, 4),
    "v5e-8": ("tpu-v5-lite-podslice", "2x4", 1, 8),
    "v5e-16": ("tpu-v5-lite-podslice", "4x4", 4, 4),
    "v5e-256": ("tpu-v5-lite-podslice", "16x16", 64, 4),
    "v5p-4": ("tpu-v5p-slice", "2x2x1", 1, 4),
    "v5p-64": ("tpu-v5p-slice", "4x4x4", 16, 4),
    "cloud:v5p-128": ("tpu-v5p-slice", "4x4x4", 16, 4),
    "v6e-8": ("tpu-v6e-slice", "2x4", 1, 8),
    "v6e-64": ("tpu-v6e-slice", "8x8", 16, 4),
    "tpu7x-64": ("tpu7x", "4x4x4", 16, 4),
}


@pytest.mark.parametrize("name", SLICES)
def test_every_slice_has_its_selectors_and_all_its_chips(name):
    accelerator, topology, hosts, chips = SLICES[name]
    config_map, job_set = make(name)
    assert problems(config_map, CONFIG_MAP) == [] and problems(job_set, JOB_SET) == []
    pod = pod_of(job_set)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    child = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (child["parallelism"], child["completions"]) == (hosts, hosts)
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": str(chips)}
    exclusive = job_set["metadata"].get("annotations", {})
    assert bool(exclusive) == (hosts > 1)


def test_several_slices_are_replicas_each_with_a_node_pool_of_its_own():
    _, job_set = make("3xv5e-8")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 3 and replicated["template"]["spec"]["parallelism"] == 1
    assert job_set["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_the_config_travels_and_the_command_reads_it():
    config_map, job_set = make("v5e-16")
    config = json.loads(config_map["data"]["config.json"])
    assert RunConfig.from_dict(config).output == "/mnt/gcs/bucket/runs/a"
    pod = pod_of(job_set)
    (container,) = pod["containers"]
    assert container["command"] == ["llama-jax", "train", "/etc/llama-jax/config.json"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    buckets = {
        mounts[name]: each["csi"]["volumeAttributes"]["bucketName"]
        for name, each in volumes.items()
        if "csi" in each
    }
    assert buckets == {"/mnt/gcs/bucket": "bucket", "/mnt/gcs/models": "models"}


def test_preemption_restarts_for_ever_and_failures_so_many_times():
    _, job_set = make("v5e-16", spot=True, max_restarts=3)
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    child = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = child["podFailurePolicy"]["rules"]
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    # Kubernetes accepts a pod failure policy with this restart policy only.
    pod = pod_of(job_set)
    assert pod["restartPolicy"] == "Never" and child["backoffLimit"] == 0
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert any(each["key"] == "cloud.google.com/gke-spot" for each in pod["tolerations"])


def test_environment_account_queue_and_secrets_by_reference():
    config_map, job_set = make(
        "v5e-4",
        environment={"A": "1", "B": "$(A) $$"},
        secrets=[read_cluster_secret("HF_TOKEN=hf/token")],
        service_account="trainer",
        namespace="ml",
        queue="tpus",
    )
    assert problems(job_set, JOB_SET) == []
    pod = pod_of(job_set)
    assert pod["serviceAccountName"] == "trainer"
    assert pod["containers"][0]["env"] == [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "$$(A) $$$$"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
    ]
    assert {config_map["metadata"]["namespace"], job_set["metadata"]["namespace"]} == {"ml"}
    assert job_set["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpus"


@pytest.mark.parametrize("text", ["HF_TOKEN", "HF_TOKEN=hf", "HF_TOKEN=HF/token", "=a/b"])
def test_secrets_that_are_no_references(text):
    with pytest.raises(ValueError, match="NAME=SECRET/KEY"):
        read_cluster_secret(text)


def test_jobs_that_cannot_be():
    with pytest.raises(ValueError, match="--image is empty"):
        make("v5e-4", max_restarts=1) and ClusterJob(
            "job", slice_named("v5e-4"), place(_run(), may_copy=False), image=" "
        )
    with pytest.raises(ValueError, match="0 or more, not -1"):
        make("v5e-4", max_restarts=-1)


def _run():
    return load_run_config(find_config("tiny-lora-cpu.yaml"), ["output=gs://b/r"])


def test_the_checker_sees_misspelled_missing_and_wrong_fields():
    _, job_set = make("v5e-16")
    job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    job_set["spec"]["failurePolicy"]["maxRestarts"] = "3"
    del job_set["spec"]["replicatedJobs"][0]["name"]
    found = "\n".join(problems(job_set, JOB_SET))
    for text in ("paralelism is unknown", "'3' is no int", ".name is missing"):
        assert text in found


def test_the_shipped_manifest_is_what_the_command_writes():
    from llama_jax import cli

    root = find_config("tiny-lora-cpu.yaml").parent.parent
    shipped = root / "deploy/example-v5e-16.yaml"
    command = next(
        line.removeprefix("#   llama-jax ")
        for line in shipped.read_text().splitlines()
        if line.startswith("#   llama-jax ")
    )
    args = cli.make_parser().parse_args([*command.split(), "--dry-run"])
    report = cli.command_module("launch").run(args)
    (text,) = report["files"].values()
    written = list(yaml.safe_load_all(text))
    there = list(yaml.safe_load_all(shipped.read_text()))
    # A field of the config that is newer than the file has its default in both.
    configs = [
        RunConfig.from_dict(json.loads(each[0].pop("data")["config.json"]))
        for each in (written, there)
    ]
    assert configs[0] == configs[1] and written == there
    assert "\n    {\n" in text, "the config is readable"
