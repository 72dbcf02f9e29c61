"""Two replicas on this machine, one of which is killed under load; prints what came of it."""

import collections
import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request

from infer.server.loaded import Built
from infer.server.settings import Settings
from tests.infer.server.running import byte_tokenizer
from tests.infer.server.scripted_engine import ScriptedEngine


def make(settings):
    """Engines that say which process they are in."""

    def build(source):
        tokenizer = byte_tokenizer()
        ids = tokenizer.encode(f"pid {os.getpid()}", add_special_tokens=False)
        engine = ScriptedEngine(tokenizer, lambda request, index: ids, step_seconds=0.01)
        return Built(engine, tokenizer)

    return build


def ask(port, *, stream=False):
    """(how it ended, text)"""
    body = {"model": "m", "prompt": "x", "stream": stream}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            raw = response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return f"status {error.code}", ""
    except TimeoutError:
        return "lost", ""
    except (OSError, http.client.HTTPException) as error:
        return f"broken {type(error).__name__}", ""
    if not stream:
        return "done", json.loads(raw)["choices"][0]["text"]
    chunks = [line[6:] for line in raw.split("\n\n") if line.startswith("data: ")]
    if not chunks or chunks[-1] != "[DONE]":
        return "cut", ""
    return "done", "".join(json.loads(c)["choices"][0]["text"] for c in chunks[:-1])


def main(port):
    import ray
    from ray import serve

    from infer.server.ray_app import Scaling, make_application

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = Settings(models=("m=smollm2-135m",), drain_seconds=5.0)  # never loaded
        scaling = Scaling(min_replicas=2, max_replicas=2, num_cpus=0.5)
        serve.run(make_application(settings, scaling, make=make))
        pids = set()
        end = time.monotonic() + 60
        while len(pids) < 2 and time.monotonic() < end:
            pids.add(ask(port)[1])
        print(json.dumps(loaded(port, pids)), flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def loaded(port, pids):
    outcomes, after, killed = collections.Counter(), collections.Counter(), threading.Event()
    over = threading.Event()
    sent = 0
    lock = threading.Lock()

    def client(stream):
        nonlocal sent
        while not over.is_set():
            with lock:
                sent += 1
            late = killed.is_set()
            how, text = ask(port, stream=stream)
            with lock:
                outcomes[how] += 1
                if late and how == "done":
                    after[text] += 1

    clients = [threading.Thread(target=client, args=(n % 2 == 0,)) for n in range(6)]
    for each in clients:
        each.start()
    time.sleep(1.5)
    os.kill(int(next(iter(pids)).split()[1]), signal.SIGKILL)
    killed.set()
    end = time.monotonic() + 120
    # Until a new replica answers beside the one that is left.
    while len(after) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    over.set()
    for each in clients:
        each.join()
    models = urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10)
    return {
        "before": sorted(pids),
        "after": sorted(after),
        "sent": sent,
        "outcomes": dict(outcomes),
        "models": json.loads(models.read())["data"][0]["id"],
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
