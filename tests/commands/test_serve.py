"""`llama-jax serve` as a process: a tiny model behind real sockets, from start to SIGTERM."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

import llama_jax as lj
from infer.generate import parts_of
from llama_jax import cli
from llama_jax.demo.make_tokenizer import FOLDER as TOKENIZER
from llama_jax.formats.hf import save_hf
from llama_jax.formats.peft import save_adapter
from llama_jax.formats.tokenizer import load_tokenizer
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from tests.adapters import trained
from tests.tiny import tiny_config, tiny_params

pytestmark = pytest.mark.compiled_quickly

ROOT = Path(__file__).parents[2]
KEY, HUB_TOKEN, ADMIN = "key-of-a-tenant", "hf_" + "s" * 20, "key-of-the-admin"


# Every server here compiles the same programs, so that the cache has them after the first.
SLOTS = ("--max-slots", "2")
# JSON may have spaces anywhere; a random model would write them until its tokens are spent.
NO_SPACES = {str(byte): -100 for byte in b" \t\r\n"}


def save_tiny(folder, *, seed=0):
    config = tiny_config(
        vocab_size=264, bos_token_id=None, eos_token_id=(258,), num_hidden_layers=1
    )
    save_hf(folder, config, tiny_params(config, seed), tokenizer=load_tokenizer(TOKENIZER))
    return folder


def save_poet(folder, model):
    """A trained adapter of the model in a folder."""
    config, params, _ = parts_of(lj.load(model))
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    adapted = trained(config, add_lora(config, params, lora, jax.random.key(1)), size=0.3)
    save_adapter(folder, config, adapted, base_model_name_or_path=None)


class Process:
    """A running `llama-jax serve`."""

    def __init__(self, log, *argv, **environment):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llama_jax.cli", "serve", "--port", "0", *map(str, argv)],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            )
        first = self.process.stdout.readline()
        assert first.startswith("REST on "), self.log.read_text()
        self.url = first.split()[-1]

    def call(self, path, body=None, *, key=KEY):
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json", "authorization": f"Bearer {key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                text = response.read().decode()
                is_json = response.headers["content-type"] == "application/json"
                return response.status, json.loads(text) if is_json else text
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def complete(self, prompt, **fields):
        status, body = self.call("/v1/completions", {"model": "m", "prompt": prompt, **fields})
        assert status == 200, body
        return body

    def wait_ready(self):
        import time

        end = time.monotonic() + 120
        while self.call("/readyz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end
            time.sleep(0.1)

    def end(self):
        """The exit code after SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model = save_tiny(folder / "tiny")
    adapter = folder / "poet"
    save_poet(adapter, model)
    process = Process(
        folder / "log", f"m={model}", "--api-key", KEY, f"--admin-key={ADMIN}",
        *SLOTS, "--max-adapters", "1", "--adapters", f"poet={adapter}", HF_TOKEN=HUB_TOKEN,
    )  # fmt: skip
    process.adapter = adapter
    try:
        # Alive while it still loads.  R103
        assert process.call("/healthz")[0] == 200
        status, body = process.call("/v1/completions", {"model": "m", "prompt": "x"})
        assert status in (200, 503), body
        process.wait_ready()
        yield process, lj.load(model)
    finally:
        process.end()


def test_greedy_answers_are_those_of_generate(served):
    process, model = served
    prompts = ["hello", "a much longer prompt about nothing", "x"]
    expected = lj.generate(model, prompts, temperature=0.0, max_tokens=12)
    with ThreadPoolExecutor(3) as pool:
        answers = list(
            pool.map(lambda p: process.complete(p, temperature=0, max_tokens=12), prompts)
        )
    assert [a["choices"][0]["text"] for a in answers] == [e.text for e in expected]
    assert [a["usage"]["completion_tokens"] for a in answers] == [
        len(e.token_ids) for e in expected
    ]
    messages = [{"role": "user", "content": "hello"}]
    [chat] = lj.generate(model, [messages], chat=True, temperature=0.0, max_tokens=12)
    status, body = process.call(
        "/v1/chat/completions",
        {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 12},
    )
    assert (status, body["choices"][0]["message"]["content"]) == (200, chat.text)


def test_seeds_and_choices(served):  # R89, R90
    process, _ = served
    asked = {"temperature": 1, "seed": 7, "max_tokens": 16}
    alone = process.complete("once", **asked)["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        beside = pool.submit(lambda: process.complete("other", max_tokens=30))
        again = pool.submit(lambda: process.complete("once", **asked))
        assert again.result()["choices"][0]["text"] == alone
        beside.result()
    four = [c["text"] for c in process.complete("once", **asked, n=4)["choices"]]
    assert len(set(four)) == 4 and four[0] == alone
    assert [c["text"] for c in process.complete("once", **asked, n=4)["choices"]] == four


def test_edges_of_sampling(served):  # R85, R86, R87, R92, R96
    process, _ = served
    greedy = process.complete("abc", temperature=0, max_tokens=8)["choices"][0]["text"]
    for same in (
        {"temperature": 1e-8},
        {"top_k": 1},
        {"top_p": 0},
        {"top_p": 1e-8},
        {"temperature": 0, "top_k": 10**6},
        {"min_p": 1.0},
    ):
        assert process.complete("abc", max_tokens=8, **same)["choices"][0]["text"] == greedy, same
    scored = process.complete(
        "abc", max_tokens=1, echo=True, logprobs=3, top_k=1, logit_bias={"97": -100}
    )["choices"][0]["logprobs"]
    assert scored["token_logprobs"][0] is None and len(scored["tokens"]) == 4
    assert all(-9999 <= value <= 0 for value in scored["token_logprobs"][1:])
    assert all(len(top) >= 3 for top in scored["top_logprobs"][1:])


def test_scores_of_an_echoed_prompt_are_those_of_generate(served):  # R91, R92
    process, model = served
    [expected] = lj.generate(
        model, ["score me"], temperature=0.0, max_tokens=1, echo=True, logprobs=2
    )
    choice = process.complete("score me", temperature=0, max_tokens=1, echo=True, logprobs=2)
    got = choice["choices"][0]["logprobs"]
    wanted = [*expected.prompt_logprobs, *expected.logprobs]
    assert got["token_logprobs"][0] is None
    values = [each.logprob for each in wanted[1:]]
    assert got["token_logprobs"][1:] == pytest.approx(values, abs=1e-5)


def test_the_process_listens_before_it_imports_jax(served):  # R103
    program = (
        "import sys\n"
        "from infer.server.settings import Settings\n"
        "from infer.server import build, run\n"
        "build.make_build(Settings(models=('m',)))\n"
        "print('jax' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "False"


def test_a_prompt_over_the_context_is_refused_and_the_engine_lives(served):  # R94
    process, model = served
    limit = model.config.max_position_embeddings
    assert process.call("/v1/models")[1]["data"][0]["max_model_len"] == limit
    status, body = process.call("/v1/completions", {"model": "m", "prompt": [65] * (limit + 1)})
    assert status == 400 and str(limit) in body["error"]["message"]
    assert process.complete("x", max_tokens=1)


def test_mixed_load_compiles_nothing(served):  # R104
    process, _ = served
    rng = random.Random(0)

    def ask(length):
        fields = {
            "max_tokens": rng.randint(1, 8),
            "temperature": rng.choice([0, 0.5, 1.3]),
            "top_p": rng.choice([1, 0.9, 0.1]),
            "top_k": rng.choice([0, 1, 20]),
            "repetition_penalty": rng.choice([1, 1.3]),
            "frequency_penalty": rng.choice([0, 0.5]),
        }
        return process.complete([rng.randrange(97, 123) for _ in range(length)], **fields)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(1, 61)))
    text = process.call("/metrics")[1]
    [line] = [x for x in text.splitlines() if x.startswith("llama_jax_compilations_total{")]
    assert float(line.split()[-1]) == 0
    free = {
        name: float(line.split()[-1])
        for line in text.splitlines()
        for name in ("llama_jax_cache_blocks", "llama_jax_requests_running")
        if line.startswith(name + "{")
    }
    assert free["llama_jax_requests_running"] == 0


def test_adapters_answer_as_if_merged(served):
    process, model = served
    plain = process.complete("once", temperature=0, max_tokens=12)["choices"][0]["text"]
    status, body = process.call(
        "/v1/completions",
        {"model": "m:poet", "prompt": "once", "temperature": 0, "max_tokens": 12},
    )
    assert status == 200
    [expected] = lj.generate(
        model, ["once"], adapter=process.adapter, temperature=0.0, max_tokens=12
    )
    assert body["choices"][0]["text"] == expected.text != plain
    assert [e["id"] for e in process.call("/v1/models")[1]["data"]] == ["m", "m:poet"]


def test_answers_keep_to_their_structure(served):
    process, _ = served
    text = process.complete(
        "x", max_tokens=30, seed=1, response_format={"type": "regex", "regex": "[ab]{3}-[0-9]{2}"}
    )["choices"][0]["text"]
    assert re.fullmatch("[ab]{3}-[0-9]{2}", text)
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 100,
        "logit_bias": NO_SPACES,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    }
    status, answer = process.call("/v1/chat/completions", body)
    choice = answer["choices"][0]
    assert (status, choice["finish_reason"]) == (200, "stop"), answer
    value = json.loads(choice["message"]["content"])
    assert set(value) == {"a", "b"} and value["a"] in (1, 2) and isinstance(value["b"], bool)
    body["response_format"] = {"type": "regex", "regex": "("}
    assert process.call("/v1/chat/completions", body)[0] == 400


def test_a_forced_tool_is_called(served):
    process, _ = served
    tool = {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    }
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 150,
        "logit_bias": NO_SPACES,
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": {"type": "function", "function": {"name": "light"}},
        "chat_template": "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    status, answer = process.call("/v1/chat/completions", body)
    assert status == 200, answer
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "light"
    assert isinstance(json.loads(call["function"]["arguments"])["on"], bool)


def test_embeddings_are_finite_and_differ(served):
    process, model = served
    body = process.call("/v1/embeddings", {"model": "m", "input": ["one", "two"]})[1]
    one, two = (row["embedding"] for row in body["data"])
    assert len(one) == model.config.hidden_size and one != two


def test_keys_show_nowhere(served):  # R106
    process, _ = served
    assert process.call("/v1/models", key="wrong-key-entirely")[0] == 401
    assert process.call("/admin/models", key=ADMIN)[0] == 200
    assert process.call("/admin/models", key=KEY)[0] == 403
    metrics = process.call("/metrics")[1]
    command = Path(f"/proc/{process.process.pid}/cmdline").read_bytes().decode()
    assert "serve" in command
    log = process.log.read_text()
    assert '"message": "ready"' in log
    for shown in (metrics, command, log):
        for secret in (KEY, ADMIN, HUB_TOKEN):
            assert secret not in shown


def test_sigterm_ends_with_zero_and_the_last_words_are_sent(tmp_path):  # R102
    model = save_tiny(tmp_path / "tiny")
    process = Process(tmp_path / "log", f"m={model}", *SLOTS, "--drain-seconds", "20")
    try:
        process.wait_ready()
        body = {"model": "m", "prompt": "x", "max_tokens": 240, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            process.url + "/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as stream:
            stream.readline()
            process.process.send_signal(signal.SIGTERM)
            rest = stream.read().decode()
        assert rest.rstrip().endswith("data: [DONE]")
        assert process.process.wait(30) == 0
    finally:
        process.end()


def test_rolling_back_restores_identical_answers(tmp_path, capsys):  # R109
    root = tmp_path / "models"
    for version in ("1", "2"):
        model = save_tiny(tmp_path / version, seed=int(version))
        argv = ["register", str(model), "--models-dir", str(root), "--name", "m"]
        assert cli.main([*argv, "--version", version]) == 0
    capsys.readouterr()
    process = Process(tmp_path / "log", "--models-dir", root, *SLOTS, LLAMA_JAX_ADMIN_KEY=ADMIN)
    try:
        process.wait_ready()

        def switch(what, **body):
            status, answer = process.call(
                f"/admin/models/{what}", {"model": "m", **body}, key=ADMIN
            )
            assert status == 200, answer

        def answer():
            body = process.complete("tell me", temperature=0, max_tokens=12)
            return body["system_fingerprint"], body["choices"][0]["text"]

        switch("activate", version="1")
        first = answer()
        assert first[0] == "m@1"
        switch("activate", version="2")
        second = answer()
        assert second[0] == "m@2" and second[1] != first[1]
        switch("rollback")
        assert answer() == first
    finally:
        assert process.end() == 0


def test_what_cannot_be_is_refused_before_jax_starts(tmp_path, capsys, monkeypatch):
    for argv, said in (
        (["serve"], "nothing to serve"),
        (["serve", "m", "--max-slots", "0"], "max_slots is 0"),
        (["serve", "m", "--max-slots", "many"], "--max-slots is 'many'"),
        (["serve", "a/m", "b/m"], "two models are called m"),
        (["serve", str(tmp_path / "nothing-here")], "neither there nor a name that is known"),
        (["serve", "m", "--config", str(tmp_path / "nowhere.yaml")], "nowhere.yaml"),
    ):
        assert cli.main(argv) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("LLAMA_JAX_MAX_SLOT", "3")
    assert cli.main(["serve", "m"]) == 2
    assert "did you mean LLAMA_JAX_MAX_SLOTS" in capsys.readouterr().err


def test_a_model_that_is_wrong_ends_the_start_with_its_reason(tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_text('{"model_type": "llama"}')
    process = Process(tmp_path / "log", wrong)
    assert process.process.wait(60) == 2
    process.process.stdout.close()
    assert "missing vocab_size" in process.log.read_text()


def test_a_flag_of_lists_may_be_given_several_times(tmp_path, capsys):
    flags = ("--adapters", f"a={tmp_path}", "--adapters", f"b={tmp_path}, c={tmp_path}")
    assert cli.main(["serve", "m=org/tiny", *flags, "--max-adapters", "1"]) == 2
    assert "3 adapters are given and max_adapters is 1" in capsys.readouterr().err
