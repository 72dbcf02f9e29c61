"""Keys, limits, overload, cancelling, slow clients, health, shutdown, crashes."""

import contextlib
import gzip
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from infer.engine.request import NotReadyError
from infer.server.api_types import ChatRequest
from infer.server.errors import ApiError
from infer.server.loaded import Source
from infer.server.openapi import openapi
from infer.server.settings import Secret, Tenant
from tests.infer.server.running import byte_tokenizer, running, until

KEY, OTHER, ADMIN = "key-of-tenant-a", "key-of-tenant-b", "key-of-the-admin"


def raw_exchange(server, data, *, timeout=10.0, until_closed=True):
    """What a server answers to bytes."""
    with socket.create_connection(("127.0.0.1", server.address.port), timeout=timeout) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := sock.recv(65536):
                received += chunk
                if not until_closed:
                    break
    return received


def open_stream(server, *, path="/v1/completions", **fields):
    """A connection with an open stream, and its response."""
    connection = http.client.HTTPConnection("127.0.0.1", server.address.port, timeout=20)
    body = {"model": "m", "prompt": "hi", "stream": True, **fields}
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    return connection, connection.getresponse()


def data_lines(response):
    for line in response:
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").strip().decode()


def endless(tokenizer):
    def script(request, index):
        while True:
            yield 65

    return script


def slow(step_seconds=0.02, **options):
    return {
        "script": endless(byte_tokenizer()),
        "step_seconds": step_seconds,
        "max_context": 8192,
        **options,
    }


# Keys


@pytest.fixture(scope="module")
def guarded():
    tenants = (Tenant("a", Secret(KEY)), Tenant("b", Secret(OTHER), concurrent_requests=1))
    with running(
        tenants=tenants, admin_key=Secret(ADMIN), engine_options=slow(0.01)
    ) as running_server:
        yield running_server


def every_route():
    for path, methods in openapi("0")["paths"].items():
        for method in methods:
            yield method.upper(), path.replace("{model}", "m")
    yield from (("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere"))


@pytest.mark.parametrize(("method", "path"), list(every_route()))
def test_every_route_but_health_needs_a_key(guarded, method, path):  # R119
    for key in (None, "", "wrong-key-entirely", KEY[:-1], KEY + "x", "ключ"):
        headers = (
            {} if key is None else {"authorization": f"Bearer {key}".encode().decode("latin-1")}
        )
        status, body, answered = guarded.call(
            path, {} if method == "POST" else None, method=method, headers=headers
        )
        if path in ("/healthz", "/readyz"):
            assert status == 200
        else:
            assert status == 401, (path, key)
            assert body["error"]["type"] == "authentication_error"
            assert answered["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Basic"])
def test_a_known_key_is_enough(guarded, scheme):
    import base64

    value = KEY if scheme.lower() == "bearer" else base64.b64encode(f"me:{KEY}".encode()).decode()
    headers = {"authorization": f"{scheme} {value}"}
    assert guarded.call("/v1/models", headers=headers)[0] == 200
    assert guarded.call("/", headers=headers)[0] == 200


def test_keys_of_tenants_and_the_admins_are_apart(guarded):  # R119
    for method, path in every_route():
        if path.startswith("/admin"):
            body = {} if method == "POST" else None
            assert guarded.call(path, body, method=method, key=KEY)[0] == 403
            assert guarded.call(path, body, method=method, key=ADMIN)[0] in (200, 400)
    assert guarded.call("/admin/models", key=ADMIN)[1]["models"][0]["name"] == "m"


def test_without_an_admin_key_the_admin_routes_are_off():
    with running() as server:
        assert server.call("/admin/models")[0] == 403
        assert server.call("/admin/models", key="anything-at-all")[0] == 403


def test_keys_are_compared_in_constant_time():
    import inspect

    from infer.server import auth

    source = inspect.getsource(auth.Gate.identify)
    assert source.count("compare_digest") == 2
    assert "break" not in source and "==" not in source


def test_keys_in_the_address_are_refused_and_not_logged(guarded, caplog):  # R107
    caplog.set_level("DEBUG")
    for name in ("api_key", "api-key", "apikey", "key", "access_token", "token", "Authorization"):
        status, body, _ = guarded.call(f"/v1/models?{name}={KEY}", key=KEY)
        assert (status, body["error"]["code"]) == (400, "key_in_query")
        assert guarded.call(f"/healthz?x=1&{name}={KEY}")[0] == 400
        assert guarded.call(f"/healthz?%{ord(name[0]):x}{name[1:]}={KEY}")[0] == 400
    until(lambda: len([r for r in caplog.records if r.getMessage() == "request"]) >= 21)
    assert KEY not in "".join(str(vars(record)) for record in caplog.records)
    assert guarded.call("/v1/models?api-version=2024&author=me", key=KEY)[0] == 200


def test_metrics_without_a_key_are_an_option():
    with running(api_key=Secret(KEY), open_metrics=True, wait_ready=False) as server:
        assert server.call("/metrics")[0] == 200
        assert server.call("/v1/models")[0] == 401


def test_the_tenant_reaches_the_engine(guarded):
    body = {"model": "m", "prompt": "x", "max_tokens": 1}
    for key, name in ((KEY, "a"), (OTHER, "b")):
        assert guarded.call("/v1/completions", body, key=key)[0] == 200
        assert guarded.engine.seen[-1].tenant == name


def test_a_tenant_has_only_so_many_requests_at_once(guarded):
    body = {"model": "m", "prompt": "x", "max_tokens": 60}
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: guarded.call("/v1/completions", body, key=OTHER), range(4))
        )
    assert sorted(status for status, _, _ in answers) == [200, 429, 429, 429]
    refused = next(answer for answer in answers if answer[0] == 429)
    assert refused[1]["error"]["code"] == "concurrency_limit_exceeded"
    assert int(refused[2]["retry-after"]) >= 1
    assert guarded.call("/v1/completions", {**body, "max_tokens": 1}, key=OTHER)[0] == 200


def test_a_tenant_has_only_so_many_requests_a_minute():
    from infer.server.auth import Caller, Gate
    from infer.server.settings import Settings

    now = [0.0]
    tenants = (Tenant("a", Secret(KEY), requests_per_minute=2), Tenant("b", Secret(OTHER)))
    gate = Gate(Settings(models=("m",), tenants=tenants), clock=lambda: now[0])

    def ask(name):
        with gate.admit(Caller(name, is_admin=False)):
            pass

    ask("a"), ask("a")
    with pytest.raises(ApiError) as refused:
        ask("a")
    assert refused.value.status == 429
    assert refused.value.retry_after_seconds == pytest.approx(30)
    ask("b")  # others are not touched
    now[0] = 29.9
    with pytest.raises(ApiError):
        ask("a")
    now[0] = 30.1
    ask("a")


# Ceilings


@pytest.fixture(scope="module")
def small():
    with running(
        max_body_bytes=10_000,
        head_timeout_seconds=0.5,
        body_timeout_seconds=0.5,
        max_header_bytes=8192,
        max_headers=50,
    ) as running_server:
        yield running_server


def head(path="/v1/completions", **headers):
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def test_a_body_that_says_it_is_too_long_is_refused_at_once(small):  # R121
    begin = time.monotonic()
    answer = raw_exchange(small, head(content_length=2**30) + b"x" * 1000)
    assert status_of(answer) == 413
    assert time.monotonic() - begin < 5
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert body["error"]["code"] == "body_too_large"


def test_a_chunked_body_without_end_is_cut(small):  # R121
    chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    answer = raw_exchange(small, head(transfer_encoding="chunked") + chunk * 50)
    assert status_of(answer) == 413
    # One that stops sending instead.
    answer = raw_exchange(small, head(transfer_encoding="chunked") + b"1\r\nx\r\n")
    assert status_of(answer) == 408


def test_bodies_may_be_packed_but_not_be_bombs(small):  # R121
    good = json.dumps({"model": "m", "prompt": "x"}).encode()
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert small.call("/v1/completions", raw=gzip.compress(good), headers=headers)[0] == 200
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < 100_000
    small_bomb = gzip.compress(b" " * 5_000_000)
    assert len(small_bomb) < 10_000
    for packed in (bomb, small_bomb):
        assert small.call("/v1/completions", raw=packed, headers=headers)[0] == 413
    assert small.call("/v1/completions", raw=b"no gzip", headers=headers)[0] == 400
    assert small.call("/v1/completions", raw=gzip.compress(good)[:-9], headers=headers)[0] == 400
    for more in (b"junk", gzip.compress(good)):
        raw = gzip.compress(good) + more
        assert small.call("/v1/completions", raw=raw, headers=headers)[0] == 400
    headers["content-encoding"] = "br"
    assert small.call("/v1/completions", raw=good, headers=headers)[0] == 415


def test_headers_have_a_ceiling_in_number_and_size(small):  # R121
    many = b"".join(b"x-%d: y\r\n" % place for place in range(10**5))
    assert status_of(raw_exchange(small, b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + many)) == 431
    few = b"".join(b"x-%d: y\r\n" % place for place in range(60))
    answer = raw_exchange(
        small, b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + few + b"\r\n"
    )
    assert status_of(answer) == 431
    huge = b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * 10 * 2**20
    answer = raw_exchange(small, huge)
    assert answer == b"" or status_of(answer) == 431  # a reset may overtake the answer
    long = b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * 9000 + b"\r\n\r\n"
    assert status_of(raw_exchange(small, long)) == 431
    assert status_of(raw_exchange(small, b"GET /" + b"y" * 9000)) == 431
    for address in (b"/" + b"y" * 9000, b"/healthz?" + b"y" * 9000):
        whole = b"GET " + address + b" HTTP/1.1\r\nhost: x\r\n\r\n"
        assert status_of(raw_exchange(small, whole)) == 431


def test_a_head_that_does_not_come_is_answered(small):
    begin = time.monotonic()
    assert status_of(raw_exchange(small, b"GET /healthz HTTP/1.1\r\nhost: x\r\n")) == 408
    assert 0.3 < time.monotonic() - begin < 5


def test_nonsense_is_answered_as_an_error_object(small):
    for raw, said in (
        (b"\x16\x03\x01 hello\r\n\r\n", "illegal request line"),
        (head(content_length="abc"), "bad Content-Length"),
        (head(transfer_encoding="gzip, chunked"), "Only Transfer-Encoding: chunked"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", "Missing mandatory Host"),
    ):
        answer = raw_exchange(small, raw)
        assert status_of(answer) == 400
        message = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert message.startswith("the request is not HTTP/1.1: ") and said in message, message


def test_other_content_types_are_refused(small):
    good = json.dumps({"model": "m", "prompt": "x"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        status, body, _ = small.call("/v1/completions", raw=good, headers={"content-type": kind})
        assert status == 400 and kind in body["error"]["message"]
    kind = "application/json; charset=utf-8"
    assert small.call("/v1/completions", raw=good, headers={"content-type": kind})[0] == 200


def test_embeddings_wait_apart_from_other_requests_and_are_bounded_too():  # R101
    with running(queue_limit=4) as server:
        begun, go_on = threading.Semaphore(0), threading.Event()

        def embed(ids):
            begun.release()
            assert go_on.wait(20)
            return [0.5]

        server.engine.embed = embed
        with ThreadPoolExecutor(40) as pool:
            body = {"model": "m", "input": "x"}
            answers = [pool.submit(server.call, "/v1/embeddings", body) for _ in range(40)]
            assert begun.acquire(timeout=20)
            until(lambda: sum(answer.done() for answer in answers) == 36)
            assert server.complete(max_tokens=1)[0] == 200
            go_on.set()
        answers = [answer.result() for answer in answers]
        assert [status for status, *_ in answers].count(200) == 4
        for status, body, headers in answers:
            if status != 200:
                assert (status, body["error"]["code"]) == (429, "queue_full")
                assert headers["retry-after"] == "1"
        assert server.call("/v1/embeddings", {"model": "m", "input": "x"})[0] == 200


def test_embeddings_of_an_engine_that_is_not_ready_are_refused():
    with running() as server:

        def embed(ids):
            raise NotReadyError("the engine is broken and takes no requests")

        server.engine.embed = embed
        status, body, headers = server.call("/v1/embeddings", {"model": "m", "input": "x"})
        assert (status, body["error"]["code"]) == (503, "model_not_ready")
        assert int(headers["retry-after"]) >= 1


def test_a_body_of_two_lengths_is_refused_and_the_connection_ends(small):
    hidden = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\ncontent-length: %d\r\n\r\n0\r\n\r\n" % (5 + len(hidden))
    )
    received = raw_exchange(small, head + hidden)
    assert received.count(b"HTTP/1.1") == 1 and status_of(received) == 400
    assert b"two_lengths" in received and b"connection: close" in received


def test_wrong_methods_and_paths_are_error_objects(small):
    status, body, headers = small.call("/v1/completions")
    assert (status, body["error"]["type"], headers["allow"]) == (
        405,
        "invalid_request_error",
        "POST",
    )
    assert small.call("/v1/completions/", {}, method="POST")[0] == 404


# Overload and time


@pytest.mark.parametrize(
    ("status", "given", "told"),
    [
        (503, None, "10"),
        (429, None, "10"),
        (400, None, None),
        (429, 0.0, "1"),
        (429, 2.01, "3"),
        (429, 1e12, "86400"),
    ],
)
def test_who_is_told_to_come_again_is_told_when(status, given, told):
    error = ApiError(status, "later", retry_after_seconds=given)
    assert error.headers.get("retry-after") == told


def test_more_prompts_than_an_idle_engine_takes_are_no_reason_to_come_again():
    sizes = {"max_slots": 2, "queue_limit": 3}
    with running(engine_options=slow(0.05, slots=2, queue_limit=3), **sizes) as server:
        for n, most in ((1, 5), (2, 4), (3, 4)):
            prompts = ["x"] * most
            status, body, _ = server.complete(prompts, n=n, max_tokens=1)
            assert status == 200 and len(body["choices"]) == n * most
            status, body, headers = server.complete([*prompts, "x"], n=n, max_tokens=1)
            assert status == 400 and headers["retry-after"] is None
            assert body["error"]["param"] == "prompt"
            assert f"at most {most} can run and wait at once" in body["error"]["message"]
        # The choices of a chat, and the texts of an embedding request, wait together.
        assert server.chat(n=16, max_tokens=1)[0] == 200
        many = {"model": "m", "input": ["x"] * 64}
        assert server.call("/v1/embeddings", many)[0] == 200


def test_over_the_queue_limit_requests_are_refused_at_once():  # R101
    options = slow(0.01, slots=2, queue_limit=4)
    with running(engine_options=options) as server:
        with ThreadPoolExecutor(50) as pool:
            begin = time.monotonic()
            answers = list(
                pool.map(
                    lambda _: (*server.complete(max_tokens=20), time.monotonic() - begin), range(50)
                )
            )
        statuses = [answer[0] for answer in answers]
        assert set(statuses) == {200, 429}
        assert 4 <= statuses.count(200) < 50
        for status, body, headers, _ in answers:
            if status == 429:
                assert body["error"]["code"] == "queue_full"
                assert headers["retry-after"] == "3"
            else:
                assert body["usage"]["completion_tokens"] == 20
        assert server.metric("llama_jax_requests_waiting") == 0
        assert server.metric("llama_jax_requests_total", outcome="queue_full") == statuses.count(
            429
        )


def test_a_request_ends_when_its_time_is_over():
    with running(engine_options=slow(0.01), request_timeout_seconds=0.3) as server:
        status, body, _ = server.complete(max_tokens=4000)
        assert (status, body["error"]["code"]) == (504, "timeout")
        connection, response = open_stream(server, max_tokens=4000)
        *_, last = data_lines(response)
        assert json.loads(last)["error"]["code"] == "timeout"
        connection.close()
        until(lambda: server.engine.is_idle)
        assert server.engine.aborts == 2


# Clients that leave or do not read


def test_a_client_that_leaves_frees_its_place():  # R97
    with running(engine_options=slow(0.01, slots=1)) as server:
        for fields in ({"stream": True}, {"stream": False}):
            sock = socket.create_connection(("127.0.0.1", server.address.port))
            body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 4000, **fields}).encode()
            sock.sendall(head(content_length=len(body)) + body)
            until(lambda: not server.engine.is_idle)
            if fields["stream"]:
                received = b""
                while received.count(b"data: ") < 5:
                    received += sock.recv(4096)
            sock.close()
            until(lambda: server.engine.is_idle, seconds=1)
            assert server.complete(max_tokens=1)[0] == 200
        assert server.metric("llama_jax_aborts_total") == 2
        assert server.metric("llama_jax_requests_total", outcome="cancelled") == 2
        assert server.metric("llama_jax_requests_active") == 0


def test_a_client_that_does_not_read_is_cut_and_harms_nobody():  # R108
    words = "y" * 400

    def script(request, index):
        while True:
            yield from words.encode()

    options = {"script": script, "step_seconds": 0.0, "max_context": 10**7}
    with running(engine_options=options, write_timeout_seconds=0.5) as server:
        sock = socket.create_connection(("127.0.0.1", server.address.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 10**6, "stream": True})
        sock.sendall(head(content_length=len(body)) + body.encode())
        until(lambda: not server.engine.is_idle)
        with ThreadPoolExecutor(8) as pool:
            others = list(pool.map(lambda _: server.complete(max_tokens=50)[0], range(8)))
        assert others == [200] * 8
        sock.recv(1)
        until(lambda: server.engine.is_idle, seconds=20)
        assert server.engine.aborts == 1
        sock.close()


def test_many_idle_streams_are_carried():
    options = slow(0.05, slots=300)
    with running(engine_options=options) as server:
        streams = [open_stream(server, max_tokens=8000) for _ in range(64)]
        assert all(response.status == 200 for _, response in streams)
        assert server.complete(max_tokens=1)[0] == 200
        for connection, response in streams:
            response.close()
            connection.close()
        until(lambda: server.engine.is_idle)


def test_connections_have_a_ceiling():
    with running(max_connections=3) as server:
        idle = [socket.create_connection(("127.0.0.1", server.address.port)) for _ in range(3)]
        time.sleep(0.1)
        answer = raw_exchange(server, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status_of(answer) == 503 and b"retry-after: 1" in answer
        assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
        for sock in idle:
            sock.close()
        until(lambda: server.call("/healthz")[0] == 200)


# Health, start, end


def test_alive_at_once_and_ready_when_warm():  # R103
    with running(engine_options={"start_seconds": 0.7}, wait_ready=False) as server:
        assert server.call("/healthz")[0] == 200
        status, body, headers = server.call("/readyz")
        assert (status, body["status"]) == (503, "starting")
        assert int(headers["retry-after"]) >= 1
        status, body, headers = server.complete()
        assert (status, body["error"]["code"]) == (503, "model_not_ready")
        assert int(headers["retry-after"]) >= 1
        until(lambda: server.call("/readyz")[0] == 200)
        assert server.complete()[0] == 200


def test_a_drain_lets_streams_finish_and_refuses_others():  # R102
    with running(engine_options=slow(0.01), drain_seconds=10.0) as server:
        streams = [open_stream(server, max_tokens=80) for _ in range(2)]
        lines = [data_lines(response) for _, response in streams]
        for each in lines:
            next(each)
        server.stop()
        until(lambda: server.call("/readyz")[0] == 503)
        assert server.call("/healthz")[0] == 200
        status, body, headers = server.complete()
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in headers
        for each in lines:
            assert list(each)[-1] == "[DONE]"
        for connection, _ in streams:
            connection.close()


def test_what_is_left_after_the_drain_gets_an_error_event():  # R102
    with running(engine_options=slow(0.01), drain_seconds=0.3) as server:
        connection, response = open_stream(server, max_tokens=8000)
        lines = data_lines(response)
        next(lines)
        begin = time.monotonic()
        server.stop()
        *_, last = lines
        assert json.loads(last)["error"]["code"] == "shutting_down"
        assert time.monotonic() - begin < 5
        connection.close()


def test_what_nobody_foresaw_is_an_error_object_too(monkeypatch):
    def broken(*given):
        raise ZeroDivisionError("a secret word")

    monkeypatch.setattr("infer.server.rest.start_completion", broken)
    with running() as server:
        status, body, headers = server.complete()
        assert status == 500 and headers["content-type"] == "application/json"
        assert body["error"]["code"] == "internal" and "secret" not in str(body)
        assert server.call("/healthz")[0] == 200


def test_what_nobody_foresaw_ends_a_stream_with_an_error_event(monkeypatch, caplog):
    def broken(*given):
        raise ZeroDivisionError("a secret word")

    monkeypatch.setattr("infer.server.completions.CompletionAnswer._chunk_choices", broken)
    with running() as server:
        connection, response = open_stream(server)
        *_, last = data_lines(response)
        connection.close()
        error = json.loads(last)["error"]
        assert (error["type"], error["code"]) == ("server_error", "internal")
        assert "secret" not in last
        until(lambda: server.metric("llama_jax_requests_total", outcome="error") == 1)
        assert server.engine.is_idle
    [logged] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert logged.message == "unexpected" and logged.request_id in error["message"]


def test_an_engine_that_breaks_is_reported_and_started_again():
    with running(engine_options=slow(0.01)) as server:
        connection, response = open_stream(server, max_tokens=8000)
        lines = data_lines(response)
        next(lines)
        waiting = ThreadPoolExecutor(1).submit(lambda: server.complete(max_tokens=8000))
        until(lambda: len(server.engine.seen) == 3)  # the probe is the first
        server.engine.break_down()
        *_, last = lines
        assert json.loads(last)["error"]["code"] == "engine_failed"
        status, body, _ = waiting.result(10)
        assert (status, body["error"]["code"]) == (500, "engine_failed")
        connection.close()
        until(lambda: server.metric("llama_jax_engine_restarts_total") == 1)
        until(lambda: server.call("/readyz")[0] == 200)
        assert server.complete(max_tokens=3)[0] == 200


def test_a_restarted_engine_has_its_adapters_again(tmp_path):
    sources = [Source("m", "1", "m", adapters={"poet": tmp_path})]
    with running(sources=sources) as server:
        assert server.engine.adapters == {"poet": str(tmp_path)}
        server.engine.adapters.clear()  # as an engine that begins afresh does
        server.engine.break_down()
        until(lambda: server.metric("llama_jax_engine_restarts_total") == 1)
        until(lambda: server.call("/readyz")[0] == 200)
        assert server.engine.adapters == {"poet": str(tmp_path)}


# Logs


def test_logs_tell_much_and_no_prompts(caplog):  # R106, R107
    caplog.set_level("DEBUG")
    with running(api_key=Secret(KEY), wait_ready=True) as server:
        body = {"model": "m", "messages": [{"role": "user", "content": "MARKERWORD"}]}
        headers = {"x-request-id": "abc-123"}
        status, _, answered = server.call("/v1/chat/completions", body, key=KEY, headers=headers)
        assert (status, answered["x-request-id"]) == (200, "abc-123")
        server.call("/v1/chat/completions", {**body, "temperature": "MARKERWORD"}, key=KEY)
        server.call("/v1/chat/completions", {"MARKERWORD": 1}, key=KEY)
        server.call("/MARKERWORD", key=KEY)
        server.call("/v1/models", headers={"x-request-id": "a b\tc"}, key=KEY)
        _, metrics, _ = server.call("/metrics", key=KEY)
    logged = "".join(str(vars(record)) for record in caplog.records)
    assert "MARKERWORD" not in logged + metrics and KEY not in logged + metrics
    done = next(r for r in caplog.records if r.getMessage() == "generation")
    assert (done.request_id, done.tenant, done.model, done.version) == (
        "abc-123",
        "default",
        "m",
        "1",
    )
    assert done.completion_tokens == 12 and done.outcome == "done"
    seen = next(r for r in caplog.records if getattr(r, "route", "") == "/v1/chat/completions")
    assert (seen.request_id, seen.status) == ("abc-123", 200)


def test_log_lines_are_json_without_secrets(monkeypatch):  # R106
    import logging

    from infer.server.logs import JsonFormatter, environment_secrets

    monkeypatch.setenv("HF_TOKEN", 'hf_secret"token')
    formatter = JsonFormatter([KEY, *environment_secrets()])
    try:
        raise ValueError(f"the prompt, {KEY}")
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "f", 1, "with %s", (KEY,), (ValueError, error, error.__traceback__)
        )
    record.note = 'hf_secret"token'
    line = formatter.format(record)
    entry = json.loads(line)
    assert entry["message"] == "with ***" and entry["note"] == "***"
    assert entry["error"]["type"] == "ValueError" and "message" not in entry["error"]
    assert "the prompt" not in line and KEY not in line and "hf_secret" not in line
    shown = json.loads(JsonFormatter([KEY], show_messages=True).format(record))
    assert shown["error"]["message"] == "the prompt, ***"


def test_other_sites_are_let_in_by_configuration_only():
    origin = {"origin": "https://app.example"}
    preflight = {**origin, "access-control-request-method": "POST"}
    with running() as server:
        assert "access-control-allow-origin" not in server.call("/v1/models", headers=origin)[2]
    with running(cors_origins=("https://app.example",), api_key=Secret(KEY)) as server:
        status, _, headers = server.call("/v1/models", method="OPTIONS", headers=preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
        _, _, headers = server.call("/v1/models", headers=origin, key=KEY)
        assert headers["access-control-allow-origin"] == "https://app.example"
        # What OpenAI's client sends from a browser.
        asked = "authorization,content-type,x-stainless-lang,openai-organization,traceparent"
        wide = {**preflight, "access-control-request-headers": asked}
        assert server.call("/v1/models", method="OPTIONS", headers=wide)[0] == 200
        for wrong in ("DELETE", "TRACE"):
            refused = {**preflight, "access-control-request-method": wrong}
            status, body, _ = server.call("/v1/models", method="OPTIONS", headers=refused)
            assert (status, body["error"]["type"]) == (400, "invalid_request_error")
        other = {"origin": "https://evil.example"}
        assert "access-control-allow-origin" not in server.call("/healthz", headers=other)[2]


def test_the_description_is_served_and_names_every_field():
    with running() as server:
        description = server.call("/openapi.json")[1]
        assert description["openapi"] == "3.1.0"
        chat = description["components"]["schemas"]["ChatRequest"]
        assert set(chat["properties"]) == set(ChatRequest.model_fields)
        assert "ChatRequest" in json.dumps(description["paths"]["/v1/chat/completions"])
        page = server.call("/docs")[1]
        assert (
            "/v1/completions" in page
            and "max_tokens" in page
            and "http" not in page.split("</style>")[1].replace("openapi", "")
        )
