"""Many mixed requests, some of them broken off, on a server with a tiny random model.

    python benchmarks/serving_soak.py [--requests 10000] [--clients 24] [--draft]

A server of its own process gets streamed and whole completions of all lengths, with several
choices, penalties, log probabilities, schemas and errors, and clients that hang up in the middle;
blocks are too few for all of them. Reported, as JSON: answers by status, resident memory of the
server after each tenth of the requests, and what /metrics says at the end: blocks in use,
preemptions, aborts, compilations after start.
"""

import argparse
import collections
import http.client
import json
import os
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax

from llama_jax.config import ModelConfig
from llama_jax.demo.make_tokenizer import FOLDER
from llama_jax.formats.hf import save_hf
from llama_jax.formats.tokenizer import load_tokenizer
from llama_jax.weights.table import init_params

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def make_model(folder):
    config = ModelConfig(
        model_type="llama",
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        eos_token_id=(258,),
    )
    save_hf(
        folder, config, init_params(config, jax.random.key(0)), tokenizer=load_tokenizer(FOLDER)
    )


def draw(rng):
    """(path, body, events to read before hanging up, or None)"""
    body = {
        "model": "tiny",
        "max_tokens": rng.choice([1, 4, 16, 48]),
        "temperature": rng.choice([0, 0.7, 1.5]),
        "seed": rng.randrange(2**31),
        "stream": rng.random() < 0.6,
    }
    for chance, more in (
        (0.1, {"n": rng.randint(2, 4)}),
        (0.1, {"logprobs": rng.randint(0, 3)}),
        (0.1, {"frequency_penalty": 0.5, "logit_bias": {"65": 3}}),
        (0.1, {"stop": ["a", "\n"]}),
        (0.1, {"top_p": 0.8}),
        (0.03, {"temperature": 9}),  # refused
        (0.02, {"max_tokens": "many"}),
    ):
        if rng.random() < chance:
            body |= more
    text = rng.choice(["once upon a time ", "x", "0123456789"]) * rng.randint(1, 24)
    path = "/v1/completions"
    body["prompt"] = text[: rng.randint(1, 400)]
    if rng.random() < 0.15:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        body.pop("logprobs", None)
        if rng.random() < 0.5:
            schema = {"name": "s", "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
    hangs_up = rng.randint(0, 3) if body["stream"] and rng.random() < 0.25 else None
    return path, body, hangs_up


def ask(port, path, body, hangs_up):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(
            "POST", path, json.dumps(body), headers={"content-type": "application/json"}
        )
        if hangs_up == 0:
            return "hung up"
        response = connection.getresponse()
        if hangs_up is not None and response.status == 200:
            for _ in range(2 * hangs_up):  # an event and the empty line behind it
                response.readline()
            return "hung up"
        data = response.read()
        if response.status == 200 and body["stream"] and b"[DONE]" not in data:
            return "cut off"
        return response.status
    finally:
        connection.close()


def resident_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024


def metrics(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.findall(r"^llama_jax_(\w+)\{[^}]*\} ([\d.e+]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found if not name.endswith("_created")}


def start(folder, draft):
    flags = ["--port", "0", "--max-slots", "8", "--cache-tokens", "1024", "--queue-limit", "512"]
    if draft:
        flags += ["--draft-tokens", "3", "--draft-model", str(folder)]
    server = subprocess.Popen(
        [sys.executable, "-m", "llama_jax.cli", "serve", f"tiny={folder}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return server, int(server.stdout.readline().rsplit(":", 1)[1])


def wait_ready(server, port):
    while server.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/readyz")
        if connection.getresponse().status == 200:
            return
        connection.close()
        time.sleep(0.2)
    raise RuntimeError(f"the server ended with {server.returncode}")


def soak(server, port, num_requests, num_clients):
    rng, counts, lock = random.Random(0), collections.Counter(), threading.Lock()
    memory, left = [resident_mib(server.pid)], queue.SimpleQueue()
    for _ in range(num_requests):
        left.put(draw(rng))

    def client():
        while True:
            try:
                work = left.get_nowait()
            except queue.Empty:
                return
            outcome = ask(port, *work)
            with lock:
                counts[str(outcome)] += 1
                if sum(counts.values()) % (num_requests // 10) == 0:
                    memory.append(resident_mib(server.pid))

    clients = [threading.Thread(target=client) for _ in range(num_clients)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return counts, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--draft", action="store_true", help="with a draft model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "tiny")
        server, port = start(Path(folder) / "tiny", args.draft)
        try:
            wait_ready(server, port)
            began = time.perf_counter()
            counts, memory = soak(server, port, args.requests, args.clients)
            seconds = time.perf_counter() - began
            time.sleep(1)  # for the last of those who hung up to be noticed
            said = metrics(port)
        finally:
            server.terminate()
            code = server.wait(60)
    report = {
        "requests": args.requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(counts),
        "resident_mib": memory,
        "blocks_in_use": said["cache_blocks"] - said["cache_blocks_free"],
        "running": said["requests_running"],
        "waiting": said["requests_waiting"],
        "exit_code": code,
        **{
            name: said[f"{name}_total"]
            for name in (
                "engine_generated_tokens",
                "preemptions",
                "aborts",
                "compilations",
                "draft_tokens",
                "accepted_tokens",
                "prefix_hit_tokens",
            )
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
