"""The files of deploy/serving against the published schemas, the command line and the metrics."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from infer.server.metrics import Metrics
from infer.server.settings import Settings, flag_fields
from infer.server.settings_reader import from_text, read_settings
from llama_jax.cli import make_parser
from llama_jax.commands.run_config import find_serve_config
from llama_jax.mesh.slices import slice_named
from tests.deploy.serving_schema import SCHEMAS
from tests.train.launch.jobset_schema import problems

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "serving"
# The file for Ray is read by tests/infer/server/test_ray.py.
MANIFESTS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "ray.yaml")
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))


def documents(path):
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def all_documents():
    return [(path.name, each) for path in MANIFESTS for each in documents(path)]


def containers():
    """Those that listen."""
    for name, each in all_documents():
        group = each["spec"].get("leaderWorkerTemplate", {})
        template = each["spec"].get("template", group.get("leaderTemplate"))
        if template is not None:
            for container in template["spec"]["containers"]:
                yield name, template["spec"], container


def settings_of(arguments, environment) -> Settings:
    """What the server in a container would run with; a wrong flag or variable raises."""
    args = make_parser().parse_args(["serve", *arguments])
    flags = {"models": tuple(args.model) or None}
    for each in flag_fields():
        value = getattr(args, each.name)
        flags[each.name] = (
            from_text(each.name, value, each.name) if isinstance(value, str) else value
        )
    config = None if args.config is None else find_serve_config(args.config)
    return read_settings(flags, config=config, environment=environment)


def exported_metrics():
    """Every name that Prometheus can see."""
    statistics = dict.fromkeys(("blocks_total", "compilations_total"), 1.0)
    metrics = Metrics(lambda: [("m", "1", statistics)])
    names = set()
    for family in metrics.registry.collect():
        names.add(family.name)
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        names |= {family.name + suffix for suffix in suffixes.get(family.type, ())}
    return names


@pytest.mark.parametrize(("name", "document"), all_documents())
def test_manifests_follow_the_published_schemas(name, document):
    schema = SCHEMAS[document["apiVersion"], document["kind"]]
    assert problems(document, schema) == []


def test_a_misspelled_field_is_seen():
    [(_, deployment)] = [each for each in all_documents() if each[1]["kind"] == "Deployment"]
    wrong = copy.deepcopy(deployment)
    container = wrong["spec"]["template"]["spec"]["containers"][0]
    container["readinesProbe"] = container.pop("readinessProbe")
    assert any(
        "readinesProbe is unknown" in each
        for each in problems(wrong, SCHEMAS["apps/v1", "Deployment"])
    )


@pytest.mark.parametrize(("name", "pod", "container"), list(containers()))
def test_containers_start_with_settings_that_exist(name, pod, container):
    environment = {
        each["name"]: each.get("value", "a-secret-of-" + each["name"][-9:])
        for each in container["env"]
    }
    settings = settings_of(["--host", "0.0.0.0", *container["args"]], environment)
    ports = {port["containerPort"] for port in container["ports"]}
    assert settings.port in ports
    assert settings.grpc_port is None or settings.grpc_port in ports
    # Nobody reaches a server from outside without a key.
    assert settings.all_tenants
    probes = [container[each] for each in container if each.endswith("Probe")]
    assert {probe["httpGet"]["port"] for probe in probes} == {settings.port}
    assert {probe["httpGet"]["path"] for probe in probes} == {"/healthz", "/readyz"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    grace = pod.get("terminationGracePeriodSeconds", 10)
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert settings.drain_seconds + sleep < grace
    mounts = {each["name"] for each in container["volumeMounts"]}
    assert mounts == {each["name"] for each in pod["volumes"]}


def test_what_belongs_together_has_the_same_labels_and_names():
    by_kind = {each["kind"]: each for each in documents(FOLDER / "gke-tpu.yaml")}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert by_kind["Service"]["spec"]["selector"] == labels
    for kind in ("PodDisruptionBudget", "PodMonitoring"):
        assert by_kind[kind]["spec"]["selector"]["matchLabels"] == labels
    target = by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == by_kind["Deployment"]["metadata"]["name"]
    ports = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert {e["port"] for e in by_kind["PodMonitoring"]["spec"]["endpoints"]} <= {
        p["name"] for p in ports
    }


def test_a_group_of_hosts_is_the_slice_of_its_config():
    by_kind = {each["kind"]: each for each in documents(FOLDER / "gke-tpu-hosts.yaml")}
    group = by_kind["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    leader, worker = (group[each]["spec"] for each in ("leaderTemplate", "workerTemplate"))
    [listening], [other] = leader["containers"], worker["containers"]
    settings = settings_of(listening["args"], {})
    wanted = slice_named(settings.slice)
    assert group["size"] == wanted.hosts
    assert listening["resources"]["limits"] == {"google.com/tpu": str(wanted.chips_per_host)}
    topology = "x".join(map(str, wanted.topology))
    assert leader["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": wanted.generation.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    # The same command everywhere; who does not listen has no ports and is asked nothing.
    own = {"ports", "readinessProbe", "livenessProbe", "lifecycle"}
    assert {**listening, **other} == listening and set(listening) - set(other) == own
    del leader["containers"], worker["containers"]
    assert leader == worker
    labels = group["leaderTemplate"]["metadata"]["labels"]
    first = {**labels, "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    assert by_kind["Service"]["spec"]["selector"] == first
    for kind in ("PodDisruptionBudget", "PodMonitoring"):
        assert by_kind[kind]["spec"]["selector"]["matchLabels"] == first
    target = by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    for key in ("apiVersion", "kind"):
        assert target[key] == by_kind["LeaderWorkerSet"][key]
    assert target["name"] == by_kind["LeaderWorkerSet"]["metadata"]["name"]


def test_the_autoscalers_read_a_metric_that_exists():
    scalers = [d for _, d in all_documents() if d["kind"] == "HorizontalPodAutoscaler"]
    assert len(scalers) == 2
    for metric in (metric for scaler in scalers for metric in scaler["spec"]["metrics"]):
        _, name, kind = metric["pods"]["metric"]["name"].split("|")
        assert name in exported_metrics() and kind == "gauge"


def test_every_metric_of_the_dashboard_exists():
    dashboard = json.loads((FOLDER / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [each["query"] for each in dashboard["templating"]["list"]]
    used = {name for each in expressions for name in re.findall(r"llama_jax_\w+", each)}
    assert len(used) > 15
    assert used <= exported_metrics()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for expression in expressions:
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_copy_what_is_there_and_start_with_flags_that_exist(path):
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    copied = [each for word, rest in steps if word == "COPY" for each in rest.split()[:-1]]
    assert {"pyproject.toml", "llama_jax", "infer", "train", "configs"} <= set(copied)
    assert all((ROOT / each).exists() for each in copied)
    entry = json.loads(next(rest for word, rest in steps if word == "ENTRYPOINT"))
    command = json.loads(next(rest for word, rest in steps if word == "CMD"))
    assert entry[:2] == ["llama-jax", "serve"]
    settings = settings_of([*entry[2:], *command], {})
    exposed = next(rest for word, rest in steps if word == "EXPOSE").split()
    assert exposed == [str(settings.port), str(settings.grpc_port)]
    extras = json.dumps(steps)
    assert "serve]" in extras
