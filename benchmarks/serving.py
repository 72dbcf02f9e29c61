"""The server beside llama.cpp's, in turn in one run: streaming clients on loopback.

usage: python benchmarks/serving.py [FOLDER] [--clients 1 8 32] [--rounds 2] [--eight-bits]
    [--serve "--no-exact"]
LLAMACPP_BIN names the folder of llama-server; without it ours runs alone. FOLDER is what
`workload.py FOLDER` makes (made when missing): SmolLM2-135M in float32. With --eight-bits both
multiply integers: ours serves int8-dynamic, llama.cpp q8_0.

Every client asks, one request after the other, for exactly --new tokens after a prompt of --length
token ids of its own; no prefix is shared. Reported for each number of clients: output tokens a
second of the whole load, the median time to the first token and per token, and ours over theirs.
Also the seconds from starting our process to /readyz, on a second start.
"""

import argparse
import contextlib
import datetime
import http.client
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workload import median, prepare, prompts

import llama_jax


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, path: str) -> Iterator[float]:
    """The server of `command`, from when it says that it is ready: the seconds that took."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(port, path):
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with code {process.returncode}")
            if time.perf_counter() - began > 300:
                raise SystemExit(f"{command[0]} is not ready after 300 s")
            time.sleep(0.05)
        yield time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def body_of(engine: str, ids: list[int], new: int) -> tuple[str, dict[str, Any]]:
    shared = {"prompt": ids, "ignore_eos": True, "temperature": 0, "stream": True}
    if engine == "llama.cpp":
        return "/completion", {**shared, "n_predict": new, "cache_prompt": False}
    return "/v1/completions", {**shared, "model": "hf", "max_tokens": new}


def one_request(engine: str, port: int, ids: list[int], new: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    path, body = body_of(engine, ids, new)
    began = time.perf_counter()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{engine} answered {response.status}: {response.read()[:300]!r}")
    times = [
        time.perf_counter()
        for line in response
        if line.startswith(b"data:") and b"[DONE]" not in line
    ]
    connection.close()
    return {"first": times[0] - began, "per_token": (times[-1] - times[0]) / (new - 1)}


def load(engine: str, port: int, waiting: list[list[int]], clients: int, new: int) -> Any:
    """All prompts through so many clients."""
    lock, done = threading.Lock(), []
    total = len(waiting)

    def client() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                ids = waiting.pop()
            result = one_request(engine, port, ids, new)
            with lock:
                done.append(result)

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if len(done) != total:
        raise SystemExit(f"{engine}: {total - len(done)} of {total} requests failed")
    return {
        "tokens_per_second": total * new / seconds,
        "first_ms": 1e3 * median([each["first"] for each in done]),
        "per_token_ms": 1e3 * median([each["per_token"] for each in done]),
    }


def distinct(rows: list[list[int]]) -> list[list[int]]:
    """Each with a first token of its own, so that no cache of prefixes helps."""
    return [[1000 + number, *row[1:]] for number, row in enumerate(rows)]


def gguf_type(args: argparse.Namespace) -> str:
    return "q8_0" if args.eight_bits else "f32"


def command_of(engine: str, args: argparse.Namespace, port: int) -> tuple[list[str], str]:
    slots = max(args.clients)
    if engine == "llama.cpp":
        binary = str(Path(os.environ["LLAMACPP_BIN"]) / "llama-server")
        context = slots * (args.length + args.new + 64)
        file = args.folder / f"model-{gguf_type(args)}.gguf"
        command = [binary, "-m", str(file), "-c", str(context)]
        command += ["-np", str(slots), "-t", str(os.cpu_count()), "--host", "127.0.0.1"]
        return [*command, "--port", str(port)], "/health"
    command = [sys.executable, "-m", "llama_jax.cli", "serve", str(args.folder / "hf")]
    command += ["--port", str(port), "--max-slots", str(slots), "--max-context", "1024"]
    if args.eight_bits:
        command += ["--quantization", "int8-dynamic"]
    return [*command, *args.serve.split()], "/readyz"


def measure(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    port = free_port()
    command, path = command_of(engine, args, port)
    with running(command, port, path) as seconds:
        counts = [max(3, 2 * clients) for clients in args.clients]
        unlike = distinct(prompts(args.folder / "hf", 1 + sum(counts), args.length))
        one_request(engine, port, unlike.pop(), args.new)
        report: dict[str, Any] = {"ready_seconds": seconds}
        for clients, count in zip(args.clients, counts, strict=True):
            waiting = [unlike.pop() for _ in range(count)]
            report[str(clients)] = load(engine, port, waiting, clients, args.new)
    print(engine, json.dumps(report), file=sys.stderr, flush=True)
    return report


def table(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    lines = [
        "| clients | server | output tokens/s | ours is | first token ms | ms a token | ours is |",
        "|---|---|---|---|---|---|---|",
    ]
    for clients in map(str, args.clients):
        ours = {
            key: median([each[clients][key] for each in results["llama-jax"]])
            for key in ("tokens_per_second", "per_token_ms")
        }
        for engine, rounds in results.items():
            speed, first, token = (
                median([each[clients][key] for each in rounds])
                for key in ("tokens_per_second", "first_ms", "per_token_ms")
            )
            lines.append(
                f"| {clients} | {engine} | {speed:.1f} | {ours['tokens_per_second'] / speed:.2f} x "
                f"| {first:.0f} | {token:.1f} | {ours['per_token_ms'] / token:.2f} x |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "smollm2-f32"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--eight-bits", action="store_true", help="weights and products of int8")
    parser.add_argument("--serve", default="", help="more flags of our server")
    args = parser.parse_args()
    prepare(args.folder, gguf_type(args))
    engines = ["llama-jax", *(["llama.cpp"] if "LLAMACPP_BIN" in os.environ else [])]
    # Fills the compilation cache: what follows are second starts.
    port = free_port()
    command, path = command_of("llama-jax", args, port)
    with running(command, port, path) as seconds:
        print(f"first start of this run: ready after {seconds:.1f} s", file=sys.stderr)
    results: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(args.rounds):
        for engine in engines:
            results[engine].append(measure(engine, args))
    starts = [round(each["ready_seconds"], 1) for each in results["llama-jax"]]
    numbers = "int8-dynamic, q8_0 of llama.cpp" if args.eight_bits else "float32"
    print(
        f"{datetime.date.today().isoformat()}: {platform.machine()}, {os.cpu_count()} cores, "
        f"llama-jax {llama_jax.__version__} {args.serve}; SmolLM2-135M, {numbers}, {args.length} + "
        f"{args.new} tokens, greedy; medians of {args.rounds} rounds; ready on a second start "
        f"after {starts} s\n"
    )
    print(table(results, args))


if __name__ == "__main__":
    main()
