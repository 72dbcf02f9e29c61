"""The Ray Serve application, with real replicas on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.compiled_quickly

SCRIPT = Path(__file__).parent / "ray_kill.py"
ROOT = SCRIPT.parents[3]

# Ray is asked in processes of its own: it changes logging, signals and warnings where it is loaded.


@pytest.mark.slow
def test_a_replica_that_is_killed_costs_errors_but_not_the_service():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(port)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    reports = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert reports, done.stderr[-2000:]
    report = json.loads(reports[0])
    assert len(report["before"]) == 2
    # Two answer again, and one of them is new.
    assert len(report["after"]) == 2 and report["after"] != report["before"]
    outcomes = report["outcomes"]
    # Every request ended: with an answer, or with an error that its client saw.
    assert sum(outcomes.values()) == report["sent"]
    assert "lost" not in outcomes
    assert outcomes["done"] > 0.9 * report["sent"]


def test_arguments_are_checked_before_anything_starts(tmp_path):
    program = (
        "import sys, json\n"
        "from infer.server.ray_app import application\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        made = application(arguments)._bound_deployment\n"
        "        told = [made.max_ongoing_requests, made.max_queued_requests]\n"
        "    except ValueError as error:\n"
        "        told = str(error)\n"
        "    print(json.dumps(told))\n"
    )
    path = tmp_path / "serve.yaml"
    path.write_text("models: [m]\nmax_slots: 4\nqueue_limit: 6\n")
    cases = [
        ({"min_replicas": "2", "max_replicas": 3}, None),
        ({"min_replica": 2}, "did you mean 'min_replicas'"),
        ({"min_replicas": 5, "max_replicas": 3}, "no less than the first"),
        ({"num_cpus": "many"}, "must be a number"),
        ({"num_tpus": -1}, "of at least 0"),
    ]
    arguments = json.dumps([{"config": str(path), **given} for given, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", program, arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    good, *refused = map(json.loads, done.stdout.splitlines()[-len(cases) :])
    assert good == [10, 6]
    for told, (_, said) in zip(refused, cases[1:], strict=True):
        assert said in told


def test_the_manifest_names_what_exists():
    import ast

    document = yaml.safe_load((ROOT / "deploy/serving/ray.yaml").read_text())
    [application] = document["applications"]
    module, _, function = application["import_path"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert function in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
    scaling = next(each for each in tree.body if getattr(each, "name", "") == "Scaling")
    fields = {each.target.id for each in scaling.body if isinstance(each, ast.AnnAssign)}
    assert set(application["args"]) - {"config"} <= fields
