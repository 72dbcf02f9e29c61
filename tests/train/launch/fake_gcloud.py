"""A `gcloud` for tests: queued resources as a small state machine, workers as folders.

Files are really copied and commands really run, each worker having a home folder of its own. The
script of what happens lies in `$FAKE_CLOUD/script.json`, every call in `calls.jsonl`. A flag that
the published reference of a command does not have is refused, as gcloud would.

Sources: cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/{create,describe,
delete,ssh,scp} and …/tpus/tpu-vm/describe.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_CLOUD"])
WIDE = {"--project", "--quiet", "--format", "--zone"}
FLAGS = {
    ("queued-resources", "create"): {
        "--accelerator-type", "--runtime-version", "--valid-until-duration", "--scopes", "--labels",
        "--node-id", "--node-count", "--node-prefix", "--spot", "--reserved", "--service-account",
        "--network", "--subnetwork", "--internal-ips",
    },
    ("queued-resources", "describe"): set(),
    ("queued-resources", "delete"): {"--force", "--async"},
    ("queued-resources", "ssh"): {"--worker", "--node", "--command", "--tunnel-through-iap"},
    ("queued-resources", "scp"): {"--worker", "--node", "--recurse", "--tunnel-through-iap"},
    ("tpu-vm", "describe"): set(),
}  # fmt: skip


def load(name, default):
    path = ROOT / name
    return json.loads(path.read_text()) if path.exists() else default


def save(name, value):
    (ROOT / name).write_text(json.dumps(value))


def fail(text, code=1):
    sys.stderr.write(f"ERROR: (gcloud.compute.tpus) {text}\n")
    sys.exit(code)


def workers(request):
    return [ROOT / f"worker-{n}" for n in range(request["hosts"])]


def take_away():
    """The machines and all that ran on them."""
    for home in ROOT.glob("worker-*"):
        for pid in home.glob("llama-jax/*/pid"):
            subprocess.run(["pkill", "-KILL", "-s", pid.read_text().strip()], check=False)
        shutil.rmtree(home)


def create(name, options, script):
    if script.get("create_errors"):
        error = script["create_errors"].pop(0)
        save("script.json", script)
        fail(error)
    if load("request.json", None) is not None:
        fail("ALREADY_EXISTS: there is one")
    request = {
        "name": name,
        "state": "WAITING_FOR_RESOURCES",
        "left": script.get("waits", 2),
        "hosts": script["hosts"],
        "type": options["--accelerator-type"],
        "count": int(options.get("--node-count", 1)),
        "spot": "--spot" in options,
    }
    save("request.json", request)


def describe(name, options, script):
    request = load("request.json", None)
    if request is None:
        fail(f"NOT_FOUND: Resource '{name}' was not found")
    shown_state = request["state"]
    if request["state"] == "SUSPENDING":
        request["state"] = "SUSPENDED"
        save("request.json", request)
    if request["state"] == "WAITING_FOR_RESOURCES":
        request["left"] -= 1
        if request["left"] <= 0:
            reason = script.get("fail_reason")
            request["state"] = "FAILED" if reason else "ACTIVE"
            request["reason"] = reason
            for home in workers(request) if not reason else ():
                home.mkdir(parents=True)
        save("request.json", request)
    spec = {"node": {"acceleratorType": request["type"]}}
    if request["count"] > 1:
        spec["multisliceParams"] = {"nodeCount": request["count"]}
    state = {"state": shown_state if shown_state == "SUSPENDING" else request["state"]}
    if request.get("reason"):
        state["failedData"] = {"error": {"message": request["reason"]}}
    shown = {"name": name, "state": state, "tpu": {"nodeSpec": [spec]}}
    if request["spot"]:
        shown["spot"] = {}
    print(json.dumps(shown))


def delete(name, options, script):
    if load("request.json", None) is None:
        fail(f"NOT_FOUND: Resource '{name}' was not found")
    if load("request.json", None)["state"] == "SUSPENDING":
        fail("FAILED_PRECONDITION: the resource is being suspended")
    if "--force" not in options and load("request.json", None)["state"] == "ACTIVE":
        fail("FAILED_PRECONDITION: nodes exist")
    (ROOT / "request.json").unlink()
    take_away()


def active():
    request = load("request.json", None)
    if request is None or request["state"] != "ACTIVE":
        fail("the machine cannot be reached", 255)
    return request


def chosen(options):
    request = active()
    return workers(request) if options["--worker"] == "all" else workers(request)[:1]


def scp(words, options, script):
    source, destination = words
    for home in chosen(options):
        target = home / destination.partition(":")[2]
        assert target.is_dir(), "scp into a folder that is not there"
        shutil.copytree(source, target / Path(source).name, dirs_exist_ok=True)


def ssh(name, options, script):
    homes, command, code = chosen(options), options["--command"], 0
    sys.stderr.write("Using ssh batch size of 64. Attempting to SSH into 1 nodes\n")
    if script.get("mute") and (ROOT / "mute").exists():
        fail("exit code 255: connection timed out", 255)
    if script.get("ssh_failures"):
        script["ssh_failures"] -= 1
        save("script.json", script)
        fail("exit code 255: connection refused", 255)
    for home in homes:
        environment = os.environ | {"HOME": str(home), "FAKE_HOST": home.name}
        done = subprocess.run(["bash", "-c", command], cwd=home, env=environment, check=False)
        code = code or done.returncode
    # After the call, because training runs while its log is followed.
    if " follow " in command and script.get("preemptions"):
        script["preemptions"] -= 1
        save("script.json", script)
        request = load("request.json", None)
        save("request.json", request | {"state": "SUSPENDING"})
        take_away()
    sys.exit(code)


def node(name, options, script):
    states = script.get("node_states", [])
    state = states.pop(0) if states else "READY"
    save("script.json", script)
    print(state)


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    options = dict(
        word.split("=", 1) if "=" in word else (word, "")
        for word in sys.argv[1:]
        if word.startswith("--")
    )
    if words[0] == "secrets":  # as called on a worker
        assert words[1:4] == ["versions", "access", "latest"], words
        print(f"value-of-{options['--secret']}")
        return
    assert words[:2] == ["compute", "tpus"], words
    kind = (words[2], words[3])
    with (ROOT / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"kind": " ".join(kind), "argv": sys.argv[1:]}) + "\n")
    unknown = set(options) - FLAGS[kind] - WIDE
    if unknown:
        fail(f"unrecognized arguments: {unknown}", 2)
    script = load("script.json", {})
    handler = {
        "create": create, "delete": delete, "ssh": ssh,
        "describe": node if kind[0] == "tpu-vm" else describe,
    }.get(kind[1])  # fmt: skip
    if kind[1] == "scp":
        scp(words[4:], options, script)
    else:
        handler(words[4], options, script)


if __name__ == "__main__":
    main()
