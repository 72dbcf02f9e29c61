"""A span for each generation and its phases, only where an endpoint is named."""

import http.server
import threading

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from infer.server import run
from infer.server.tracing import Tracing
from tests.infer.server.running import running

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(run, "tracing_to", lambda endpoint: Tracing(provider))
    return exporter


def test_a_request_is_a_span_with_its_phases(spans):
    with running(otlp_endpoint="http://nowhere") as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        body = {"model": "m", "messages": [{"role": "user", "content": "secret words"}]}
        assert server.call("/v1/chat/completions", body, headers=headers)[0] == 200
        long = {**body, "messages": [{"role": "user", "content": "x" * 5000}]}
        status, _, _ = server.call("/v1/chat/completions", long)
        assert status == 400
    found = spans.get_finished_spans()
    assert [span.name for span in found] == ["queue", "prefill", "decode", "chat", "chat"]
    *phases, whole, refused = found
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert all(phase.parent.span_id == whole.context.span_id for phase in phases)
    times = [whole.start_time, *(phase.start_time for phase in phases), phases[-1].end_time]
    assert times == sorted(times) and times[-1] <= whole.end_time
    assert [a.end_time for a in phases[:-1]] == [b.start_time for b in phases[1:]]
    assert whole.attributes["llama_jax.request_id"] == "mine"
    assert whole.attributes["gen_ai.response.model"] == "m@1"
    assert whole.attributes["gen_ai.usage.output_tokens"] == len("Hello there") + 1
    assert "secret" not in whole.to_json()
    assert refused.status.status_code is StatusCode.ERROR and refused.parent is None


def test_spans_are_sent():
    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["content-length"])
            got.append((self.path, self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    collector = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with running(otlp_endpoint=endpoint) as server:
        assert server.call("/v1/completions", {"model": "m", "prompt": "x"})[0] == 200
    collector.shutdown()
    collector.server_close()
    ((path, body),) = got
    assert path == "/v1/traces" and b"llama-jax" in body and b"prefill" in body
