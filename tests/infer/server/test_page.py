"""The chat page in a real browser, where one is installed."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

from infer.server.app import PAGE
from infer.server.settings import Secret
from tests.infer.server.running import byte_tokenizer, running, until
from tests.infer.server.scripted_engine import saying
from tests.infer.server.test_operation import KEY, slow

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_DRIVER = shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # W3C WebDriver's name for a reference
with_browser = pytest.mark.skipif(
    _BROWSER is None or _DRIVER is None, reason="chromium and chromedriver are not installed"
)


class Browser:
    """Enough of the WebDriver protocol."""

    def __init__(self, port):
        self._base = f"http://127.0.0.1:{port}"
        until(self._is_up)
        options = {
            "binary": _BROWSER,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._base += f"/session/{self._send('POST', '/session', wanted)['sessionId']}"

    def _is_up(self):
        with contextlib.suppress(OSError):
            return self._send("GET", "/status")["ready"]

    def _send(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())["value"]

    def open(self, url):
        self._send("POST", "/url", {"url": url})

    def run(self, script):
        return self._send("POST", "/execute/sync", {"script": script, "args": []})

    def text(self, css):
        return self.run(f"return document.querySelector({json.dumps(css)})?.textContent ?? ''")

    def click(self, css):
        self._send("POST", f"/element/{self._find(css)}/click", {})

    def type(self, css, text):
        element = self._find(css)
        self._send("POST", f"/element/{element}/clear", {})
        self._send("POST", f"/element/{element}/value", {"text": text})

    def _find(self, css):
        return self._send("POST", "/element", {"using": "css selector", "value": css})[_ELEMENT]

    def close(self):
        self._send("DELETE", "")


@pytest.fixture(scope="module")
def browser():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    driver = subprocess.Popen([_DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        opened = Browser(port)
        yield opened
        opened.close()
    finally:
        driver.terminate()
        driver.wait(10)


def last_answer(browser):
    return browser.run("return [...document.querySelectorAll('.assistant')].at(-1)?.textContent")


@with_browser
def test_a_conversation(browser):
    options = {"script": saying(byte_tokenizer(), "Hello <b>there</b> 안녕"), "step_seconds": 0.01}
    with running(engine_options=options) as server:
        browser.open(server.url)
        until(lambda: browser.text("#model option") == "m (version 1)")
        browser.type("#temperature", "0.25")
        browser.type("#seed", "7")
        browser.type("#max_tokens", "99")
        browser.type("#prompt", "How are you?")
        browser.click("#send")
        until(lambda: last_answer(browser) == "Hello <b>there</b> 안녕")
        until(lambda: "tokens/s" in browser.text("#status") and "m@1" in browser.text("#status"))
        params = server.engine.seen[-1].params
        assert (params.temperature, params.seed, params.max_tokens) == (0.25, 7, 99)
        # The next turn knows the one before.
        browser.type("#prompt", "Again\n")
        until(lambda: len(server.engine.seen) == 3)
        prompt = byte_tokenizer().decode(server.engine.seen[-1].prompt_token_ids)
        assert "How are you?" in prompt and "<b>there</b>" in prompt and "Again" in prompt
        until(lambda: not browser.run("return document.getElementById('send').disabled"))


@with_browser
def test_stop_frees_the_engine_and_keeps_the_text(browser):
    with running(engine_options=slow(0.01)) as server:
        browser.open(server.url)
        until(lambda: browser.text("#model option") != "")
        browser.type("#max_tokens", "5000")
        browser.type("#prompt", "x")
        browser.click("#send")
        until(lambda: len(last_answer(browser) or "") > 10)
        browser.click("#stop")
        until(lambda: server.engine.is_idle, seconds=2)
        assert server.engine.aborts == 1
        until(lambda: "stopped" in browser.text("#status"))
        assert last_answer(browser).startswith("AAAA")


@with_browser
def test_errors_are_shown_and_a_key_can_be_entered(browser):
    with running(api_key=Secret(KEY)) as server:
        # A browser asks for the key when the page itself needs one; this is what it then sends.
        browser.open(server.url.replace("http://", f"http://me:{KEY}@"))
        until(lambda: browser.text("#model option") != "")
        browser.run("document.querySelector('details').open = true")
        browser.type("#version", "9")
        browser.type("#prompt", "x")
        browser.click("#send")
        until(lambda: "has the version 1 only" in browser.text(".assistant.error"))
        browser.run("document.getElementById('version').value = ''")
        browser.type("#key", KEY)
        browser.type("#prompt", "y")
        time.sleep(0.1)
        browser.click("#send")
        until(lambda: last_answer(browser) == "Hello there")
        prompt = byte_tokenizer().decode(server.engine.seen[-1].prompt_token_ids)
        assert "user\nx" not in prompt  # the question that failed is not part of the conversation


def test_the_page_needs_nothing_from_outside():
    page = PAGE.read_text(encoding="utf-8")
    assert "://" not in page and " src=" not in page and "@import" not in page
    assert "innerHTML" not in page  # what a model says is text
    with running(wait_ready=False) as server:
        status, body, headers = server.call("/")
        assert (status, body) == (200, page)
        assert "default-src 'none'" in headers["content-security-policy"]
