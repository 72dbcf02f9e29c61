"""Traces of requests by OpenTelemetry (extra `otel`), for who names an endpoint to send them to.

A span for each generation, a child of the client's own where its request names one, and in it what
the time went to: waiting for a slot (queue), reading the prompt (prefill), answering (decode). No
prompt, answer or address is in them.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# What a client's headers say about the span that asks (W3C Trace Context).
HEADERS = ("traceparent", "tracestate")


@dataclass
class Times:
    """When what happened, of `time.perf_counter`; None is never. queued: the seconds that the
    request waited for a slot of the engine, from when it was submitted."""

    arrived: float
    submitted: float | None = None
    queued: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def phases(self, ended: float) -> Iterator[tuple[str, float, float]]:
        """(name, begin, end) of those that began."""
        if self.submitted is None:
            return
        if self.queued is None:
            yield "queue", self.submitted, ended
            return
        admitted = self.submitted + self.queued
        yield "queue", self.submitted, admitted
        yield "prefill", admitted, ended if self.first_token is None else self.first_token
        if self.first_token is not None and self.last_token is not None:
            yield "decode", self.first_token, self.last_token


@dataclass(frozen=True)
class Traced:
    """A generation that has ended."""

    endpoint: str
    outcome: str
    times: Times
    ended: float
    attributes: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


class Tracing:
    """provider: OpenTelemetry's, whose exporters get the spans."""

    def __init__(self, provider: Any):
        self._provider = provider
        self._tracer = provider.get_tracer("llama_jax")

    def record(self, traced: Traced) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        since = time.time_ns() - time.perf_counter_ns()

        def at(seconds: float) -> int:
            return since + round(seconds * 1e9)

        caller = TraceContextTextMapPropagator().extract(dict(traced.headers))
        span = self._tracer.start_span(
            traced.endpoint,
            context=caller,
            kind=trace.SpanKind.SERVER,
            start_time=at(traced.times.arrived),
            attributes={**traced.attributes, "llama_jax.outcome": traced.outcome},
        )
        if traced.outcome not in ("done", "cancelled"):
            span.set_status(trace.StatusCode.ERROR, traced.outcome)
        inside = trace.set_span_in_context(span)
        for name, begin, end in traced.times.phases(traced.ended):
            self._tracer.start_span(name, context=inside, start_time=at(begin)).end(at(end))
        span.end(at(traced.ended))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def tracing_to(endpoint: str) -> Tracing:
    """Spans go to an OTLP endpoint over HTTP, such as http://localhost:4318/v1/traces, in batches
    and in a thread of their own. Raises RuntimeError without the packages."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"traces need the otel extra ({error.name} is missing); run: "
            f"pip install 'llama-jax[serve,otel]', or leave otlp_endpoint out"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "llama-jax"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return Tracing(provider)
