"""Two real processes that serve one model together, against the same engine in one."""

import contextlib
import io
import json
import signal
import socket
import threading
import types

import jax
import numpy as np
import pytest

import infer.engine.hosts
from infer.engine.agreement import Agreement
from infer.engine.columns import most_demanding_columns
from infer.engine.engine import BatchingEngine
from infer.engine.following import Following
from infer.engine.hosts import Followers, HostLostError, Leader, encode, read_order
from infer.engine.options import EngineOptions
from infer.engine.paged_runner import PagedRunner
from infer.engine.placement import check_processes
from infer.engine.plan import Plan
from infer.engine.request import Request
from infer.engine.trial import InexactError
from infer.generate import generate
from infer.params import SamplingParams
from infer.sampling import Needs
from llama_jax.formats import hf
from llama_jax.load import load
from tests.infer.engine.client import ask
from tests.infer.engine.host_group import ROOM, SERVE, starting
from tests.infer.engine.test_adapters import write_adapter
from tests.infer.server.running import byte_tokenizer
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = FAMILIES["llama-gqa"].replace(
        vocab_size=264, bos_token_id=None, eos_token_id=(258,), num_hidden_layers=2
    )
    folder = tmp_path_factory.mktemp("served") / "m"
    hf.save_hf(folder, config, tiny_params(config), tokenizer=byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start():
    with starting() as started:
        yield started


WISHES = [
    {"temperature": 0, "max_tokens": 20},
    {"temperature": 0, "max_tokens": 8, "logprobs": 2},
    {"seed": 1, "max_tokens": 12, "n": 2},
    {"seed": 3, "max_tokens": 12, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"seed": 4, "max_tokens": 9, "logit_bias": {"5": 4.0, "7": -100}},
]


@pytest.mark.slow
def test_two_processes_answer_as_one_does(start, folder, cache):
    group = start(f"m={folder}", *SERVE, *ROOM, cache=cache)
    group.wait_ready()
    model = load(folder)

    def check(prompt, wish):
        found = group.complete(prompt, **wish)
        params = dict(wish)
        if "logit_bias" in wish:
            params["logit_bias"] = {int(k): v for k, v in wish["logit_bias"].items()}
        wanted = generate(model, prompt, **params)
        assert [each["text"] for each in found] == [each.text for each in wanted]
        for one, other in zip(found, wanted, strict=True):
            if wish.get("logprobs") is not None:
                values = [each.logprob for each in other.logprobs]
                np.testing.assert_allclose(one["logprobs"]["token_logprobs"], values, atol=1e-5)

    for number, wish in enumerate(WISHES):
        check(f"the prompt number {number} " * (number + 1), wish)
    # A structure is a mask that process 0 makes and the others must have too.
    shape = {"type": "regex", "regex": "[a-f]{6}"}
    (choice,) = group.complete("spell", response_format=shape, max_tokens=20, temperature=0)
    assert len(choice["text"]) == 6 and set(choice["text"]) <= set("abcdef")
    # Prompts are scored, and states summed, on all devices.
    (choice,) = group.complete("scored text", echo=True, logprobs=0, max_tokens=0)
    assert len(choice["logprobs"]["token_logprobs"]) == len("scored text")
    with group.open("/v1/embeddings", {"model": "m", "input": "hello"}) as response:
        assert len(json.load(response)["data"][0]["embedding"]) == model.config.hidden_size
    # Two that do not fit together: one goes to the hosts' memory and comes back, on both of them.
    long = {"temperature": 0, "max_tokens": 90}
    threads = [threading.Thread(target=check, args=(word, long)) for word in ("first", "other")]
    errors = []
    threading.excepthook, before = lambda args: errors.append(args.exc_value), threading.excepthook
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threading.excepthook = before
    assert not errors
    with group.open("/metrics") as response:
        text = response.read().decode()
    line = next(
        each for each in text.splitlines() if each.startswith("llama_jax_preemptions_total")
    )
    assert float(line.split()[-1]) > 0
    # A pod that is deleted sends it to every container of the group.
    for process in reversed(group.processes):
        process.send_signal(signal.SIGTERM)
    assert [code for code, _ in group.ended()] == [0, 0]


@pytest.mark.slow
def test_adapters_and_a_draft_model_over_two_processes(start, folder, cache, tmp_path):
    model, key = load(folder), "an-admin-key-of-16"
    adapters = {
        name: write_adapter(
            tmp_path / name, model.params, seed=seed, rank=2, modules=modules, config=model.config
        )
        for seed, (name, modules) in enumerate({"a": "all-linear", "b": ["v_proj"]}.items())
    }
    given = [f"--adapters={name}={each}" for name, each in adapters.items()]
    more = (*given, "--max-adapters", "2", "--draft-model", str(folder), "--draft-tokens", "2")
    group = start(f"m={folder}", *SERVE, *ROOM, *more, "--admin-key", key, cache=cache)
    group.wait_ready()
    names = {"m": None, "m:a": adapters["a"], "m:b": adapters["b"]}
    models = {name: load(folder, adapter=each) for name, each in names.items()}

    def check(word):
        found = {}
        for name, each in models.items():
            for wish in ({"temperature": 0, "max_tokens": 16}, {"seed": 1, "max_tokens": 9}):
                (choice,) = group.complete(word, **wish, model=name)
                (wanted,) = generate(each, word, **wish)
                assert choice["text"] == wanted.text
                found.setdefault(tuple(wish), set()).add(wanted.text)
        assert all(len(texts) == 3 for texts in found.values())  # adapters change something

    check("first")
    for action in ("unload", "load"):
        body = {"model": "m", "adapter": "a"}
        with group.open(f"/admin/adapters/{action}", body, authorization=f"Bearer {key}"):
            pass
    check("again")
    with group.open("/metrics") as response:
        lines = response.read().decode().splitlines()
    accepted = next(each for each in lines if each.startswith("llama_jax_accepted_tokens_total"))
    assert float(accepted.split()[-1]) > 0
    for process in group.processes:
        process.send_signal(signal.SIGTERM)
    assert [code for code, _ in group.ended()] == [0, 0]


def test_a_lost_host_ends_the_server_and_its_clients_hear_of_it(start, folder, cache):
    group = start(f"m={folder}", *SERVE, *ROOM, cache=cache)
    group.wait_ready()
    wish = {"model": "m", "prompt": "tell", "max_tokens": 120, "ignore_eos": True, "stream": True}
    with group.open("/v1/completions", wish) as stream:
        assert stream.readline().startswith(b"data: ")
        group.processes[1].kill()
        rest = stream.read().decode()
    assert "is gone" in rest and "[DONE]" not in rest
    (code, errors), (killed, _) = group.ended()
    assert (code, killed) == (1, -signal.SIGKILL)
    assert "given up" in errors


def test_others_end_when_process_0_is_gone(start, folder, cache):
    group = start(f"m={folder}", *SERVE, *ROOM, cache=cache)
    group.wait_ready()
    group.processes[0].kill()
    (_, _), (code, errors) = group.ended()
    # Whichever notices first, its own connection or JAX's.
    assert (code == 1 and "process 0 of this server is gone" in errors) or code == -signal.SIGABRT


@pytest.mark.parametrize(
    "more, message",
    [
        (("--max-slots", "3"), "need the same max_slots, but it is 2 in process 0, 3 in process 1"),
        (("--models-dir", "models"), "need the same models_dir, but it is None in process 0"),
    ],
)
def test_what_several_processes_cannot_serve(start, folder, cache, more, message):
    flags = (f"m={folder}", *SERVE)
    for code, errors in start(*flags, cache=cache, others=(*flags, *more)).ended():
        assert code == 2 and message in errors


# Without processes


@pytest.mark.parametrize(
    "sizes, cache, message",
    [
        (None, None, "say how it is divided over their 8 devices, such as mesh tensor=8"),
        ({"tensor": 2}, None, "takes 2 devices, but 2 processes have 8"),
        ({"data": 2, "tensor": 4}, None, "start a group of processes for each copy"),
        ({"tensor": 8}, "slots", "cache is slots, which lie on one device"),
        ({"tensor": 4, "fsdp": 2}, "pages", None),
    ],
)
def test_meshes_of_several_processes(monkeypatch, sizes, cache, message):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    refused = (
        contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
    )
    with refused:
        check_processes(sizes, EngineOptions(cache=cache))


class Lost:
    """Followers of which one is gone."""

    def __init__(self):
        self.reasons = []
        self.agreement = Agreement("test")

    def told(self, order, *arguments):
        return contextlib.nullcontext()

    def close(self):
        pass

    def lost(self, seconds):
        return "one of the others is gone"

    def give_up(self, reason):
        self.reasons.append(reason)


def test_a_step_that_fails_because_another_is_gone_says_that(monkeypatch):
    """Whichever the engine notices first, the failure or its cause."""
    config = FAMILIES["llama-gqa"]
    lost = Lost()
    options = EngineOptions(max_slots=2, max_context=64, cache="pages", block_size=16)
    engine = BatchingEngine((config, tiny_params(config), None), options, followers=lost)
    engine.start()

    def fail(*_):
        raise RuntimeError("connection reset")

    monkeypatch.setattr(engine._runner, "begin_step", fail)
    (answer,) = ask(engine, Request("r", (5, 6), SamplingParams(max_tokens=4)))
    assert answer.last.reason == "engine" and answer.last.message == "one of the others is gone"
    engine._thread.join(60)
    assert lost.reasons == ["one of the others is gone"]


@pytest.mark.parametrize("error, ends", [(RuntimeError, True), (InexactError, False)])
def test_first_steps_that_fail_here_alone_end_the_group(monkeypatch, error, ends):
    """The others may wait in them; but all find alike that no steps sum alike."""

    def fail(_):
        raise error("no")

    config, lost = FAMILIES["llama-gqa"], Lost()
    options = EngineOptions(max_slots=2, max_context=64, cache="pages", block_size=16)
    engine = BatchingEngine((config, tiny_params(config), None), options, followers=lost)
    monkeypatch.setattr(PagedRunner, "drop_inexact_shapes", fail)
    with pytest.raises(error, match="no"):
        engine.start()
    assert lost.reasons == ["one of the others is gone"] * ends


class Failing(PagedRunner):
    def drop(self, number):
        self.fail()


@pytest.mark.parametrize("is_gone", [True, False])
def test_an_order_that_fails_because_process_0_is_gone_says_that(is_gone):
    ours, theirs = socket.socketpair()
    leader = object.__new__(Leader)
    leader._socket = ours

    def fail():
        if is_gone:
            theirs.close()
        raise RuntimeError("connection reset")

    runner = object.__new__(Failing)
    runner.model = types.SimpleNamespace(context=contextlib.nullcontext)
    runner.fail = fail
    following = Following(lambda *_: runner)
    following._runners[0] = runner
    theirs.sendall(encode(0, "drop", [1]) + encode(0, "drop", [2]))
    wanted = (HostLostError, "is gone: conn") if is_gone else (RuntimeError, "^connection reset")
    with theirs, pytest.raises(wanted[0], match=wanted[1]):
        following.run(leader)


def test_orders_arrive_as_they_were():
    columns, needs = most_demanding_columns(3, vocab_size=40)
    mask = np.arange(2, dtype=np.uint32)
    plan = Plan(
        rows=3,
        length=1,
        placed={0: (4, [7], (1, 2)), 2: (0, (9,), range(3))},
        adapters=[-1, -1, -1],
        memory=[0, 4, 4],
        masks={2: mask},
        columns=columns,
        taken=[1, 0, 5],
        needs=needs,
    )
    orders = [(3, "run", [plan]), (0, "read", [1, [2, 3], (4,), 0, 32, -1]), (1, "drop", [2**40])]
    stream = io.BytesIO(b"".join(encode(*order) for order in orders))
    engine, name, (found,) = read_order(stream)
    assert (engine, name) == (3, "run") and isinstance(found.needs, Needs) and found.needs == needs
    assert found.placed == {0: [4, [7], [1, 2]], 2: [0, [9], [0, 1, 2]]}
    assert (found.adapters, found.memory, found.taken) == (plan.adapters, plan.memory, plan.taken)
    np.testing.assert_array_equal(found.masks[2], mask)
    assert found.masks[2].dtype == mask.dtype
    for field in ("temperature", "top_k", "seed", "choice"):
        one, other = getattr(found.columns, field), getattr(columns, field)
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert found.columns.bias is None
    assert read_order(stream) == (0, "read", [1, [2, 3], [4], 0, 32, -1])
    assert read_order(stream) == (1, "drop", [2**40])
    with pytest.raises(EOFError):
        read_order(stream)


def test_what_an_order_cannot_carry_is_refused():
    with pytest.raises(TypeError, match="cannot carry a set"):
        encode(0, "read", [{1, 2}])


def test_who_does_not_know_the_secret_is_no_follower(monkeypatch):
    """And one that is gone is noticed at once, without an order."""
    told: list[str] = []
    met = threading.Event()

    def exchange(name, value=""):
        if value:
            told.append(value)
            met.set()
        assert met.wait(10)
        return [told[0], ""]

    monkeypatch.setattr(infer.engine.hosts, "exchange", exchange)
    monkeypatch.setattr(infer.engine.hosts, "coordinator_host", lambda: "127.0.0.1")
    monkeypatch.setattr(infer.engine.hosts, "leave", lambda: None)
    reasons, given_up = [], threading.Event()

    def give_up(message):
        reasons.append(message)
        given_up.set()

    made: list[Followers] = []
    meeting = threading.Thread(target=lambda: made.append(Followers("x", give_up)))
    meeting.start()
    assert met.wait(10)
    port = int(told[0].split()[0])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(bytes(32))
        stranger.settimeout(10)
        assert stranger.recv(1) == b""  # shown the door
    leader = Leader("x")
    meeting.join(10)
    with made[0].told(2, "score", [[1, 2]]):
        """The others may begin."""
    orders = leader.orders()
    assert next(orders) == (2, "score", [[1, 2]])
    assert not leader.is_gone(0.01) and made[0].lost(0.01) is None
    orders.close()
    assert given_up.wait(10) and "is gone" in reasons[0]
    assert made[0].lost(10) == reasons[0]
    with pytest.raises(HostLostError, match="is gone"):
        for _ in range(100):  # the first may still go into the kernel's buffer
            with made[0].told(2, "score", [[0] * 10000]):
                """Nobody is left."""
    made[0].close()
