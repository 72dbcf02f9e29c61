"""A run as a JobSet on GKE: one child Job a slice, one pod a host.

Node selectors and the resource name are GKE's (cloud.google.com/kubernetes-engine/docs/concepts/
plan-tpus), fields those of jobset.x-k8s.io/v1alpha2 and batch/v1. GKE itself tells each pod its
number and its neighbours' names, from which JAX finds the first process.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from llama_jax.mesh.slices import Slice
from train.launch import places
from train.launch.places import Placed
from train.launch.plan import check_name
from train.launch.secrets import StoredSecret

ACCELERATOR = "cloud.google.com/gke-tpu-accelerator"
TOPOLOGY = "cloud.google.com/gke-tpu-topology"
SPOT = "cloud.google.com/gke-spot"
CHIPS = "google.com/tpu"
# Gives each child Job a node pool of its own: the chips of a slice are wired to each other.
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
NODE_POOL = "cloud.google.com/gke-nodepool"
CONFIG_FOLDER = "/etc/llama-jax"

# libtpu's, JAX's coordinator's, and that between slices.
_PORTS = {"tpu": 8471, "jax": 8482, "slices": 8080}

# kubernetes.io/docs/concepts/overview/working-with-objects/names: labels, and subdomains of them.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MAX_LABEL, _MAX_SUBDOMAIN = 63, 253
_REPLICATED = "slice"
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")


@dataclass(frozen=True)
class ClusterJob:
    """max_restarts: after failures; a pod that is preempted or evicted does not count.
    secrets: variables from Kubernetes secrets, where `secret` is `NAME/KEY`."""

    name: str
    slice: Slice
    placed: Placed
    image: str
    spot: bool = False
    namespace: str = "default"
    service_account: str | None = None
    max_restarts: int = 10
    grace_seconds: int = 120
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[StoredSecret] = ()
    queue: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_pod_names(self.name, self.slice)
        if not self.image.strip():
            raise ValueError("--image is empty; name the container image that holds llama-jax")
        if not _LABEL.fullmatch(self.namespace):
            raise ValueError(
                f"--namespace {self.namespace!r} must be lower-case letters, digits and hyphens, "
                f"begin and end without a hyphen and have at most {_MAX_LABEL} characters"
            )
        # The queue is named in a label of the JobSet, whose values are shorter than names.
        _check_object("--queue", self.queue, _MAX_LABEL)
        _check_object("--service-account", self.service_account, _MAX_SUBDOMAIN)
        if not _IMAGE.fullmatch(self.image):
            raise ValueError(f"--image {self.image!r} is no name of an image")
        variables = [*self.environment, *(each.variable for each in self.secrets)]
        for name in variables:
            if variables.count(name) > 1:
                raise ValueError(f"{name} is set twice, by --env or --secret")
        if self.max_restarts < 0:
            raise ValueError(f"--retries must be 0 or more, not {self.max_restarts}")
        if self.placed.copies:
            raise ValueError(f"{next(iter(self.placed.copies))} is a local file")


def _check_pod_names(name: str, wanted: Slice) -> None:
    """JobSet refuses names whose pods' names, made of them, would be longer than a label
    (its webhook; five characters at the end are drawn)."""
    longest = f"{name}-{_REPLICATED}-{wanted.count - 1}-{wanted.hosts - 1}-abcde"
    if len(longest) > _MAX_LABEL:
        room = _MAX_LABEL - (len(longest) - len(name))
        raise ValueError(
            f"--name {name!r} has {len(name)} characters, and pods are named after it; for "
            f"{wanted.name} give one of at most {room}"
        )


def _check_object(flag: str, value: str | None, length: int) -> None:
    if value is None:
        return
    if len(value) > length or not all(map(_LABEL.fullmatch, value.split("."))):
        raise ValueError(
            f"{flag} {value!r} must be lower-case letters, digits, hyphens and dots, each part "
            f"between dots beginning and ending without a hyphen, {length} characters at most"
        )


def read_cluster_secret(text: str) -> StoredSecret:
    """`HF_TOKEN=hf/token`: the key `token` of the Kubernetes secret `hf`."""
    match = re.fullmatch(r"([A-Za-z_]\w*)=([a-z0-9][a-z0-9.-]*)/([A-Za-z0-9._-]+)", text)
    if match is None:
        raise ValueError(
            "--secret on GKE must be NAME=SECRET/KEY, the names of a Kubernetes secret and of a "
            "key in it (not the value): --secret HF_TOKEN=hf/token"
        )
    return StoredSecret(match[1], f"{match[2]}/{match[3]}")


def manifest(job: ClusterJob) -> str:
    """The YAML documents: a ConfigMap with the run config, and the JobSet."""
    return yaml.dump_all(
        [config_map(job), job_set(job)],
        Dumper=_Readable,
        sort_keys=False,
        default_flow_style=False,
        width=100,
    )


class _Readable(yaml.SafeDumper):
    """Writes a text of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)


_Readable.add_representer(str, _text)


def _metadata(job: ClusterJob) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "llama-jax", "app.kubernetes.io/instance": job.name}
    return {"name": job.name, "namespace": job.namespace, "labels": labels}


def config_map(job: ClusterJob) -> dict[str, Any]:
    text = json.dumps(job.placed.config, indent=2) + "\n"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job),
        "data": {"config.json": text},
    }


def job_set(job: ClusterJob) -> dict[str, Any]:
    metadata = _metadata(job)
    if job.slice.hosts > 1 or job.slice.count > 1:
        metadata["annotations"] = {EXCLUSIVE: NODE_POOL}
    if job.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = job.queue
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # All pods run one program: when one ends, all are started again, from the checkpoint.
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {
                        "name": "disruption",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {
                    "name": _REPLICATED,
                    "replicas": job.slice.count,
                    "template": {"spec": _child_job(job)},
                }
            ],
        },
    }


def _child_job(job: ClusterJob) -> dict[str, Any]:
    return {
        "parallelism": job.slice.hosts,
        "completions": job.slice.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # A lost node is told apart from a failed program by this condition of its pod.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                }
            ]
        },
        "template": {
            "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
            "spec": _pod(job),
        },
    }


def _pod(job: ClusterJob) -> dict[str, Any]:
    selector = {
        ACCELERATOR: job.slice.generation.gke_accelerator,
        TOPOLOGY: "x".join(map(str, job.slice.topology)),
    }
    tolerations = [{"key": CHIPS, "operator": "Exists", "effect": "NoSchedule"}]
    if job.spot:
        selector[SPOT] = "true"
        tolerations.append(
            {"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [_container(job)],
        "volumes": [
            {"name": "config", "configMap": {"name": job.name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            *(_bucket(bucket, number) for number, bucket in enumerate(job.placed.buckets)),
        ],
    }
    if job.service_account is not None:
        pod["serviceAccountName"] = job.service_account
    return pod


def _container(job: ClusterJob) -> dict[str, Any]:
    chips = job.slice.chips_per_host
    environment: list[dict[str, Any]] = [
        # Kubernetes replaces $(NAME) in values, and reads $$ as one sign.
        {"name": name, "value": value.replace("$", "$$")}
        for name, value in job.environment.items()
    ]
    for each in job.secrets:
        name, _, key = each.secret.partition("/")
        environment.append(
            {"name": each.variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
        )
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    mounts += [
        {"name": f"bucket-{number}", "mountPath": f"{places.MOUNT_ROOT}/{bucket}"}
        for number, bucket in enumerate(job.placed.buckets)
    ]
    return {
        "name": "train",
        "image": job.image,
        "command": ["llama-jax", "train", f"{CONFIG_FOLDER}/config.json"],
        "env": environment,
        "ports": [{"name": name, "containerPort": port} for name, port in _PORTS.items()],
        # Requests and limits of chips must be equal, and all chips of the host.
        "resources": {"requests": {CHIPS: str(chips)}, "limits": {CHIPS: str(chips)}},
        "volumeMounts": mounts,
    }


def _bucket(bucket: str, number: int) -> dict[str, Any]:
    return {
        "name": f"bucket-{number}",
        "csi": {
            "driver": "gcsfuse.csi.storage.gke.io",
            "volumeAttributes": {
                "bucketName": bucket,
                # Checkpoints are written under another name and then renamed.
                "mountOptions": "implicit-dirs,rename-dir-limit=200000",
            },
        },
    }
