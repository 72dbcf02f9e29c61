"""The batching engine beside the offline generator, in one run on the same weights.

    python benchmarks/serving_engine.py [MODEL] [--clients 1 8 32] [--prompt 128] [--new 64]

Reported, as JSON: seconds to start; for each number of clients output tokens a second of the
engine and of the offline generator, the median time to the first token and per token; the first
token's time with a prefix of 1,000 tokens cold and cached; how a long prompt that arrives changes
the others' time per token; compilations after start. Machines drift: compare within a run.
"""

import argparse
import json
import statistics
import threading
import time

import numpy as np

import llama_jax as lj
from infer.completion import Piece
from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.engine.request import Failed, Finished, Request
from infer.generate import generate
from infer.params import SamplingParams


class Client:
    """Sends one request and notes when each token came."""

    def __init__(self, engine, name, prompt, new_tokens):
        self.times, self.ended = [], threading.Event()
        self.began = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        engine.submit(Request(name, tuple(prompt), params), self)

    def __call__(self, event):
        if isinstance(event, Piece) and event.token_ids:
            self.times.append(time.perf_counter())
        if isinstance(event, Finished | Failed):
            assert isinstance(event, Finished), event
            self.ended.set()

    @property
    def first_token_seconds(self):
        return self.times[0] - self.began

    @property
    def seconds_per_token(self):
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def measure_clients(engine, model, prompts, new_tokens):
    began = time.perf_counter()
    clients = [Client(engine, f"c{n}", p, new_tokens) for n, p in enumerate(prompts)]
    for client in clients:
        client.ended.wait()
    seconds = time.perf_counter() - began
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    lists = [list(map(int, prompt)) for prompt in prompts]
    generate(model, lists, params.replace(max_tokens=2))  # compiles
    offline = generate(model, lists, params)
    return {
        "engine_tokens_per_second": len(prompts) * new_tokens / seconds,
        "offline_tokens_per_second": offline.tokens_per_second,
        "first_token_seconds": statistics.median(c.first_token_seconds for c in clients),
        "engine_seconds_per_token": statistics.median(c.seconds_per_token for c in clients),
        "offline_seconds_per_step": offline.stats.decode_seconds / (new_tokens - 1),
    }


def measure_prefix(engine, draw):
    prefix = draw(1000)
    times = []
    for name in ("cold", "cached"):
        client = Client(engine, name, [*prefix, *draw(20)], 2)
        client.ended.wait()
        times.append(client.first_token_seconds)
    return {"cold": times[0], "cached": times[1], "ratio": times[1] / times[0]}


def measure_stall(engine, draw, long_tokens):
    """Eight clients generate; a long prompt arrives in between."""
    clients = [Client(engine, f"s{n}", draw(64), 160) for n in range(8)]
    while any(len(client.times) < 40 for client in clients):
        time.sleep(0.01)
    arrived = time.perf_counter()
    long = Client(engine, "long", draw(long_tokens), 1)
    long.ended.wait()
    read = time.perf_counter()
    for client in clients:
        client.ended.wait()
    alone, beside = [], []
    for client in clients:
        steady = [t for t in client.times[10:] if t < arrived]
        during = [t for t in client.times if arrived <= t <= read]
        alone.append((steady[-1] - steady[0]) / (len(steady) - 1))
        if len(during) > 1:
            beside.append((during[-1] - during[0]) / (len(during) - 1))
    return {
        "seconds_per_token": statistics.median(alone),
        "beside_a_long_prompt": statistics.median(beside) if beside else None,
        "long_first_token_seconds": long.first_token_seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--long", type=int, default=4000)
    args = parser.parse_args()
    model = lj.load(args.model, dtype="float32")
    rng = np.random.default_rng(0)

    def draw(count):
        return rng.integers(3, model.config.vocab_size - 3, count).tolist()

    context = min(model.config.max_position_embeddings, args.long + 256)
    slots = max(*args.clients, 9)
    engine = BatchingEngine(
        model, EngineOptions(max_slots=slots, max_context=context, num_blocks=1024)
    )
    began = time.perf_counter()
    engine.start()
    report = {"start_seconds": time.perf_counter() - began, "clients": {}}
    for count in args.clients:
        prompts = [draw(args.prompt) for _ in range(count)]
        report["clients"][count] = measure_clients(engine, model, prompts, args.new)
    report["prefix_of_1000"] = measure_prefix(engine, draw)
    report["stall"] = measure_stall(engine, draw, args.long)
    report["compilations"] = engine.statistics()["compilations_total"]
    engine.stop(1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
