"""A server that really listens, in a thread of the test process."""

import asyncio
import contextlib
import json
import logging
import threading
import urllib.error
import urllib.request

from infer.server.loaded import Built, Source
from infer.server.run import serve
from infer.server.settings import Settings
from llama_jax.demo.make_tokenizer import FOLDER
from llama_jax.formats.tokenizer import load_tokenizer
from tests.infer.scripted import word_tokenizer
from tests.infer.server.scripted_engine import ScriptedEngine, saying

END = 258
CHATS = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
_TOKENIZER = None


def byte_tokenizer():
    global _TOKENIZER
    if _TOKENIZER is None:
        _TOKENIZER = load_tokenizer(FOLDER)
    return _TOKENIZER


class Running:
    """What a test needs of it. engines: by NAME@VERSION, as they were built."""

    def __init__(self, address, engines, stop):
        self.address, self.engines, self._stop = address, engines, stop
        self.url = f"http://127.0.0.1:{address.port}"

    @property
    def engine(self):
        return next(iter(self.engines.values()))

    def stop(self):
        self._stop()

    def call(self, path, body=None, *, key=None, method=None, headers=None, raw=None):
        """(status, parsed body or text, headers)"""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        if data is not None and "content-type" not in {h.lower() for h in headers or {}}:
            request.add_header("content-type", "application/json")
        if key is not None:
            request.add_header("authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, _parsed(response), response.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parsed(error), error.headers

    def chat(self, text="hi", **fields):
        body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
        return self.call("/v1/chat/completions", body)

    def complete(self, prompt="hi", **fields):
        return self.call("/v1/completions", {"model": "m", "prompt": prompt, **fields})

    def metric(self, name, **labels):
        """The sum of a metric's series that have these labels."""
        _, text, _ = self.call("/metrics")
        total = 0.0
        for line in text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(
                f'{key}="{each}"' in series for key, each in labels.items()
            ):
                total += float(value)
        return total


def _parsed(response):
    text = response.read().decode()
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return json.loads(text) if is_json else text


@contextlib.contextmanager
def running(
    build=None, *, sources=None, models=("m",), wait_ready=True, engine_options=None, **settings
):
    """Serves scripted engines until the block ends, which must not take long.

    build: (source) -> Built; by default an engine that says "Hello there".
    """
    # A command that ran in this process before left a handler of a stream that pytest closed.
    root = logging.getLogger()
    root.handlers[:] = [each for each in root.handlers if type(each) is not logging.StreamHandler]
    engines = {}

    def built(source):
        if build is None:
            tokenizer = byte_tokenizer()
            options = {"script": saying(tokenizer, "Hello there"), **(engine_options or {})}
            made = Built(ScriptedEngine(tokenizer, **options), tokenizer)
        else:
            made = build(source)
        engines[f"{source.name}@{source.version}"] = made.engine
        return made

    if sources is None:
        sources = [Source(name, "1", name) for name in models]
    values = {"models": models, "port": 0, "drain_seconds": 2.0, **settings}
    listening, result, box = threading.Event(), [], {}

    async def main():
        box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def on_listening(address):
            box["address"] = address
            listening.set()

        return await serve(
            Settings(**values), built, sources, on_listening=on_listening, stop=box["stop"]
        )

    def run():
        try:
            result.append(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001  shown by the test
            result.append(error)
            listening.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert listening.wait(10)
    if result:
        raise result[0]
    server = Running(
        box["address"], engines, lambda: box["loop"].call_soon_threadsafe(box["stop"].set)
    )
    try:
        if wait_ready:
            until(lambda: server.call("/readyz")[0] == 200)
        yield server
    finally:
        if thread.is_alive():
            with contextlib.suppress(RuntimeError):
                server.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
    assert result == [0], result


def until(condition, seconds=10.0):
    """Waits for a condition; fails when it does not come."""
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def events_of(server, path, body):
    """The events of a stream, parsed, [DONE] as a text."""
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps({"model": "m", "stream": True, **body}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = response.read()
    events = []
    for line in raw.split(b"\n\n")[:-1]:
        assert line.startswith(b"data: ") and b"\n" not in line
        data = line.removeprefix(b"data: ").decode()  # each event is whole UTF-8 by itself
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def word_server(words, said, **options):
    """A server whose model says these words, one a token, and whose end token is </s>."""
    tokenizer = word_tokenizer(
        words, template="{% for m in messages %}{{ m.content }}{% endfor %}", **options
    )
    ids = [tokenizer.token_to_id(word) for word in said]
    assert None not in ids

    def build(source):
        engine = ScriptedEngine(tokenizer, lambda request, index: ids, end_tokens=frozenset({1}))
        return Built(engine, tokenizer)

    return running(build)
