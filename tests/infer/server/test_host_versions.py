"""Versions of a registry in two real processes that serve them together."""

import contextlib
import functools
import json
import shutil
import signal
import threading
import urllib.error
from pathlib import Path

import pytest

from infer.generate import generate
from infer.registry import register
from llama_jax.formats import hf
from llama_jax.formats.checkpoint import save_model
from llama_jax.load import load
from llama_jax.weights.quantize import Quantization
from tests.infer.engine.host_group import ROOM, SERVE, starting
from tests.infer.engine.test_adapters import write_adapter
from tests.infer.server.running import byte_tokenizer
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly

KEY = "an-admin-key-of-16"
WISH = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of versions 1, 2 and 3, of which 2 has other shapes."""
    root, folders = tmp_path_factory.mktemp("versions"), {}
    for version, layers in (("1", 2), ("2", 1), ("3", 2)):
        config = FAMILIES["llama-gqa"].replace(
            vocab_size=264, bos_token_id=None, eos_token_id=(258,), num_hidden_layers=layers
        )
        folders[version] = root / version
        params = tiny_params(config, seed=int(version))
        hf.save_hf(folders[version], config, params, tokenizer=byte_tokenizer())
    return folders


@pytest.fixture
def registry(folders, tmp_path):
    for version, folder in folders.items():
        register(tmp_path / "models", "m", version, folder, source="a test")
    return tmp_path / "models"


@pytest.fixture
def wanted(folders):
    """What a version answers alone, in this process."""
    models = {version: load(folder) for version, folder in folders.items()}
    return functools.cache(
        lambda version, prompt: generate(models[version], prompt, **WISH)[0].text
    )


class Admin:
    """What tests ask of a group."""

    def __init__(self, group):
        self._group = group

    def post(self, action, **body):
        """(status, answer)"""
        try:
            with self._group.open(f"/admin/{action}", body, authorization=f"Bearer {KEY}") as found:
                return found.status, json.load(found)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def ask(self, prompt, model="m", request_id="r"):
        """The version that answered, and its text."""
        body = {"model": model, "prompt": prompt, **WISH}
        with self._group.open("/v1/completions", body, **{"x-request-id": request_id}) as found:
            version = found.headers["x-llama-jax-version"].removeprefix("m@")
            return version, json.load(found)["choices"][0]["text"]


class Traffic:
    """Two clients that ask all the time, until the end of the block; each answer is checked."""

    def __init__(self, admin, wanted, models):
        self._admin, self._wanted = admin, wanted
        self._is_over = threading.Event()
        self.versions, self.errors = [], []
        self._threads = [threading.Thread(target=self._ask, args=(each,)) for each in models]

    def _ask(self, model):
        number = 0
        while not self._is_over.is_set():
            number += 1
            prompt = f"question {number % 3}"
            try:
                version, text = self._admin.ask(prompt, model, request_id=f"{model}-{number}")
                assert text == self._wanted(version, prompt), (version, prompt)
            except Exception as error:  # noqa: BLE001  shown by the test
                self.errors.append(error)
                return
            self.versions.append(version)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join(120)
        assert not self.errors, self.errors


def adapter_of(model, folder):
    linear = {"modules": "all-linear", "config": model.config}
    return write_adapter(folder, model.params, seed=3, rank=2, **linear)


def test_versions_come_and_go_in_two_processes(registry, folders, wanted, cache):
    second = load(folders["2"])
    adapter = adapter_of(second, registry / "m/adapters/a")
    flags = ("--models-dir", str(registry), *SERVE, *ROOM, "--admin-key", KEY)
    flags = (*flags, "--max-adapters", "1", "--draft-tokens", "2")
    with starting() as start:
        group = start(*flags, cache=cache)
        group.wait_ready()
        admin = Admin(group)
        assert admin.ask("first")[0] == "1"  # loaded on demand
        with Traffic(admin, wanted, ["m", "m"]) as traffic:
            status, state = admin.post("models/activate", model="m", version="2", share=0.5)
            assert (status, state["canary"]) == (200, "2")
            seen = len(traffic.versions)
            while len(traffic.versions) < seen + 12 and not traffic.errors:
                traffic._is_over.wait(0.05)
        assert {"1", "2"} <= set(traffic.versions)
        # Steps of two engines, begun in two threads, in every order.
        with Traffic(admin, wanted, ["m@1", "m@2", "m@1", "m@2"]) as traffic:
            while len(traffic.versions) < 24 and not traffic.errors:
                traffic._is_over.wait(0.05)
        with Traffic(admin, wanted, ["m@1", "m@2"]):
            assert admin.post("adapters/load", model="m", version="2", adapter="a")[0] == 200
            (answer,) = generate(load(folders["2"], adapter=adapter), "now", **WISH)
            assert admin.ask("now", "m@2:a") == ("2", answer.text) != ("2", wanted("2", "now"))
        assert admin.post("models/activate", model="m", version="2")[1]["active"] == "2"
        assert admin.ask("now") == ("2", wanted("2", "now"))
        assert admin.post("models/rollback", model="m")[1]["active"] == "1"
        assert admin.ask("now") == ("1", wanted("1", "now"))
        assert admin.post("models/unload", model="m", version="2")[0] == 200
        assert admin.ask("again") == ("1", wanted("1", "again"))
        # One that was unloaded comes back, as a new engine.
        assert admin.ask("again", "m@2") == ("2", wanted("2", "again"))
        for process in group.processes:
            process.send_signal(signal.SIGTERM)
        assert [code for code, _ in group.ended()] == [0, 0]


@pytest.mark.parametrize("broken", ["missing", "changed", "another"])
def test_a_version_that_one_process_cannot_load_leaves_the_old_one(
    registry, folders, wanted, cache, tmp_path, broken
):
    """Process 1 has a copy of the registry, of which a version is damaged."""
    own, copy = tmp_path / "of_0", tmp_path / "of_1"
    shutil.copytree(registry, copy / "models")
    shutil.copytree(registry, own / "models")
    weights = copy / "models/m/3/model/model.safetensors"
    if broken == "another":
        shutil.rmtree(copy / "models/m/3")
        register(copy / "models", "m", "3", folders["2"], source="another")
    else:
        weights.chmod(0o644)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.unlink()
        if broken == "changed":
            weights.write_bytes(content)
    message = {
        "missing": "model.safetensors is missing",
        "changed": "is not what the manifest says (SHA-256)",
        "another": "is another than that of process 0",
    }[broken]
    flags = ("--models-dir", "models", *SERVE, *ROOM, "--admin-key", KEY)
    with starting() as start:
        group = start(*flags, cache=cache, folders=(own, copy))
        group.wait_ready()
        admin = Admin(group)
        assert admin.ask("first") == ("1", wanted("1", "first"))
        with Traffic(admin, wanted, ["m"]):
            status, answer = admin.post("models/activate", model="m", version="3")
        assert status == 503 and answer["error"]["code"] == "load_failed"
        assert "process 1: " in answer["error"]["message"]
        assert message in answer["error"]["message"]
        assert admin.ask("then") == ("1", wanted("1", "then"))
        # The group goes on, with whatever is whole.
        assert admin.post("models/activate", model="m", version="2")[1]["active"] == "2"
        assert admin.ask("then") == ("2", wanted("2", "then"))


def test_two_models_that_are_given_at_the_start(folders, wanted, cache):
    with starting() as start:
        group = start(f"m={folders['1']}", f"k={folders['2']}", *SERVE, *ROOM, cache=cache)
        group.wait_ready()
        admin = Admin(group)
        assert admin.ask("now")[1] == wanted("1", "now")
        assert admin.ask("now", "k")[1] == wanted("2", "now")


def test_a_lost_host_ends_all_versions_and_their_clients_hear_of_it(registry, cache):
    flags = ("--models-dir", str(registry), *SERVE, *ROOM)
    with starting() as start, contextlib.ExitStack() as streams:
        group = start(*flags, cache=cache)
        group.wait_ready()
        opened = []
        for model in ("m@1", "m@2"):
            wish = {"model": model, "prompt": "tell", "max_tokens": 120, "ignore_eos": True}
            opened.append(group.open("/v1/completions", {**wish, "stream": True}))
            streams.enter_context(opened[-1])
            assert opened[-1].readline().startswith(b"data: ")
        group.processes[1].kill()
        for stream in opened:
            rest = stream.read().decode()
            assert "is gone" in rest and "[DONE]" not in rest
        assert [code for code, _ in group.ended()] == [1, -signal.SIGKILL]


@pytest.mark.slow
def test_versions_whose_reading_needs_the_devices(folders, wanted, cache, tmp_path):
    """Checkpoints, adapters put on the weights, and what is quantized while it is read: others
    wait for that."""
    model = load(folders["1"])
    save_model(tmp_path / "saved", model.config, model.params, model.tokenizer)
    adapter = adapter_of(model, tmp_path / "adapter")
    root, how = tmp_path / "models", Quantization("int8")
    register(root, "m", "1", folders["1"], source="a test")
    register(root, "m", "2", tmp_path / "saved", source="a test")
    register(root, "m", "3", folders["1"], source="a test", adapter=Path(adapter))
    for flags, quantization in (((), None), (("--quantization", "int8"), how)):
        models = {
            "1": load(folders["1"], quantization=quantization),
            "3": load(folders["1"], quantization=quantization, adapter=adapter),
        }
        models["2"] = models["1"]

        @functools.cache
        def alone(version, prompt, models=models):
            return generate(models[version], prompt, **WISH)[0].text

        with starting() as start:
            given = ("--models-dir", str(root), *flags, "--admin-key", KEY)
            group = start(*given, *SERVE, *ROOM, cache=cache)
            group.wait_ready()
            admin = Admin(group)
            assert admin.ask("first", "m@1") == ("1", alone("1", "first"))
            with Traffic(admin, alone, ["m@1"]):
                for version in ("2", "3"):
                    status, _ = admin.post("models/activate", model="m", version=version)
                    assert status == 200
                    assert admin.ask("then") == (version, alone(version, "then"))
