"""What Prometheus reads. Every name begins with llama_jax_.

Counters of an engine are read from it when Prometheus asks, so they cost nothing in between; when
an engine is unloaded its series end.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_BY = ["model", "version"]
_FIRST_TOKEN_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5,
)  # fmt: skip
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# (name in Engine.statistics, name here, what it is)
ENGINE_COUNTERS = (
    ("prefix_hit_tokens_total", "prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    ("prefix_query_tokens_total", "prefix_query_tokens", "Prompt tokens looked up there"),
    ("prompt_tokens_total", "engine_prompt_tokens", "Prompt tokens read"),
    ("generated_tokens_total", "engine_generated_tokens", "Tokens sampled"),
    ("preemptions_total", "preemptions", "Requests that gave up their blocks to others"),
    ("aborts_total", "aborts", "Requests that were cancelled before their end"),
    ("compilations_total", "compilations", "Programs compiled since the engine started"),
    ("draft_tokens_total", "draft_tokens", "Tokens proposed by speculation"),
    ("accepted_tokens_total", "accepted_tokens", "Proposed tokens that were right"),
)
ENGINE_GAUGES = (
    ("requests_waiting", "requests_waiting", "Requests in the engine's queue"),
    ("requests_running", "requests_running", "Requests in the batch"),
    ("blocks_total", "cache_blocks", "Blocks of the key and value cache"),
    ("blocks_free", "cache_blocks_free", "Blocks of it that nobody uses"),
)


class Metrics:
    """One server's. engines: gives (model, version, statistics) of every loaded engine."""

    def __init__(self, engines: Callable[[], Iterable[tuple[str, str, Mapping[str, float]]]]):
        self.registry = CollectorRegistry()
        self.http_requests = self._counter(
            "http_requests", "HTTP requests by route and status", ["route", "status"]
        )
        self.requests = self._counter(
            "requests", "Generations by how they ended", [*_BY, "endpoint", "outcome"]
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answers", _BY)
        self.completion_tokens = self._counter("completion_tokens", "Tokens of answers", _BY)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival", _FIRST_TOKEN_BUCKETS
        )
        self.queue = self._histogram(
            "queue_seconds", "From a request's submission to its slot", _FIRST_TOKEN_BUCKETS
        )
        self.per_token = self._histogram(
            "time_per_output_token_seconds", "After the first one", _TOKEN_BUCKETS
        )
        self.request_seconds = self._histogram(
            "request_seconds", "From a request's arrival to its end", _REQUEST_BUCKETS
        )
        self.active = Gauge(
            "llama_jax_requests_active",
            "Generations that have arrived and not ended",
            registry=self.registry,
        )
        self.engine_restarts = self._counter(
            "engine_restarts", "Engines that broke and were started again", _BY
        )
        self.registry.register(_Engines(engines))

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"llama_jax_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"llama_jax_{name}", text, _BY, buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines(Collector):
    def __init__(self, engines: Callable[[], Iterable[tuple[str, str, Mapping[str, float]]]]):
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        loaded = list(self._engines())
        for source, name, text in ENGINE_COUNTERS:
            counter = CounterMetricFamily(f"llama_jax_{name}", text, labels=_BY)
            for model, version, statistics in loaded:
                if source in statistics:
                    counter.add_metric([model, version], statistics[source])
            yield counter
        for source, name, text in ENGINE_GAUGES:
            gauge = GaugeMetricFamily(f"llama_jax_{name}", text, labels=_BY)
            for model, version, statistics in loaded:
                if source in statistics:
                    gauge.add_metric([model, version], statistics[source])
            yield gauge
        up = GaugeMetricFamily("llama_jax_model_loaded", "1 for every loaded version", labels=_BY)
        for model, version, _ in loaded:
            up.add_metric([model, version], 1)
        yield up
