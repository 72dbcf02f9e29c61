"""Several engines as one: who gets a request, and what is everybody's."""

import jax
import pytest

from infer.engine.engine import BatchingEngine
from infer.engine.replicas import Replicas
from infer.engine.request import Failed, Finished, NotReadyError, Request
from infer.params import SamplingParams
from infer.server.build import given_sources, make_build
from infer.server.settings import Settings
from llama_jax.demo.make_tokenizer import FOLDER as TOKENIZER
from llama_jax.formats.hf import save_hf
from llama_jax.formats.tokenizer import load_tokenizer
from tests.tiny import tiny_config, tiny_params


class Stand:
    """An engine that holds requests until it is told."""

    def __init__(self, refuses=()):
        self.state, self.max_context, self.refuses = "stopped", 100, refuses
        self.held, self.adapters, self.cancelled, self.embedded = {}, set(), [], 0

    def start(self):
        self.state = "ready"

    def stop(self, drain_seconds):
        self.state = "stopped"

    def submit(self, request, on_event):
        if self.state != "ready":
            raise NotReadyError(self.state)
        self.held[request.id] = on_event

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        self.held.pop(request_id)(Failed("cancelled", ""))

    def embed(self, prompt_token_ids):
        self.embedded += 1
        return [0.0]

    def add_adapter(self, name, folder):
        if name in self.refuses:
            raise ValueError(name)
        self.adapters.add(name)

    def remove_adapter(self, name):
        self.adapters.remove(name)

    def statistics(self):
        return {"blocks_total": 4, "requests_running": len(self.held)}


def request(name, *tokens):
    return Request(name, tokens, SamplingParams(max_tokens=1))


@pytest.fixture
def pair():
    engines = [Stand(), Stand(refuses=("large",))]
    both = Replicas(engines)
    both.start()
    return both, engines


def test_requests_go_where_there_are_fewest(pair):
    both, engines = pair
    events = []
    for n in range(6):
        both.submit(request(f"{n}", 1, 2, 3), events.append)
    assert [len(engine.held) for engine in engines] == [3, 3]
    for name in list(engines[1].held):
        engines[1].held.pop(name)(Finished(3, 1, 0))
    both.submit(request("6", 9), events.append)
    both.submit(request("7", 9), events.append)
    assert [len(engine.held) for engine in engines] == [3, 2]
    assert len(events) == 3
    assert both.statistics() == {"blocks_total": 8, "requests_running": 5}


def test_who_begins_alike_goes_to_the_same_while_none_is_busier(pair):
    both, engines = pair
    places = set()
    for tokens in ((1, 2, 3), (1, 2, 3), (1, 2, 3)):
        both.submit(request("a", *tokens), print)
        places |= {place for place, engine in enumerate(engines) if "a" in engine.held}
        both.cancel("a")
    assert len(places) == 1
    firsts = set()
    for n in range(20):
        both.submit(request("b", n), print)
        firsts |= {place for place, engine in enumerate(engines) if "b" in engine.held}
        both.cancel("b")
    assert firsts == {0, 1}


def test_a_request_that_is_refused_leaves_nothing(pair):
    both, engines = pair
    for engine in engines:
        engine.state = "draining"
    with pytest.raises(NotReadyError):
        both.submit(request("a", 1), print)
    for engine in engines:
        engine.state = "ready"
    both.submit(request("a", 1), print)
    with pytest.raises(ValueError, match="unique"):
        both.submit(request("a", 1), print)
    both.cancel("a")
    both.cancel("a")  # nothing happens
    assert [name for engine in engines for name in engine.cancelled] == ["a"]


def test_the_worst_state_is_that_of_all_and_only_who_is_down_starts(pair):
    both, engines = pair
    assert both.state == "ready"
    engines[0].state = "broken"
    assert both.state == "broken"
    engines[1].start = None  # it runs
    both.start()
    assert both.state == "ready"
    both.stop(0)
    assert both.state == "stopped"


def test_adapters_are_on_all_or_on_none(pair):
    both, engines = pair
    both.add_adapter("small", "folder")
    with pytest.raises(ValueError, match="large"):
        both.add_adapter("large", "folder")
    assert [engine.adapters for engine in engines] == [{"small"}, {"small"}]
    both.remove_adapter("small")
    assert [engine.adapters for engine in engines] == [set(), set()]
    both.embed((1,))
    both.embed((1,))
    assert [engine.embedded for engine in engines] == [1, 1]


@pytest.fixture
def folder(tmp_path):
    config = tiny_config(
        vocab_size=264, bos_token_id=None, eos_token_id=(258,), num_hidden_layers=1
    )
    folder = tmp_path / "tiny"
    save_hf(folder, config, tiny_params(config), tokenizer=load_tokenizer(TOKENIZER))
    return folder


def test_a_server_makes_its_copies_from_its_settings(folder):
    settings = Settings(models=(str(folder),), mesh="data=2", max_slots=1, piece_tokens=32)
    (source,) = given_sources(settings)
    built = make_build(settings)(source)
    assert isinstance(built.engine, Replicas)
    copies = built.engine._engines
    assert all(isinstance(engine, BatchingEngine) for engine in copies)
    devices = [engine.model.mesh.devices.flat[:] for engine in copies]
    assert len({device for each in devices for device in each}) == 2
    for engine in copies:
        leaves = jax.tree.leaves(engine.model.params)
        assert {device for leaf in leaves for device in leaf.devices()} == set(
            engine.model.mesh.devices.flat
        )
        assert engine.state == "stopped" and engine.max_context == built.engine.max_context


def test_versions_share_a_draft_model_in_the_form_in_which_it_runs(folder):
    settings = Settings(
        models=(str(folder),), draft_model=str(folder), draft_tokens=3, piece_tokens=32
    )
    (source,) = given_sources(settings)
    build = make_build(settings)
    drafts = [build(source).engine._guesser._draft.model.params for _ in range(2)]
    one, other = (jax.tree.leaves(draft["layers"]) for draft in drafts)
    assert isinstance(drafts[0]["layers"], tuple)
    assert all(mine is yours for mine, yours in zip(one, other, strict=True))


def test_settings_that_do_not_suit_the_model_or_the_machine_are_refused(folder):
    for changes, message in (
        ({"architecture": "smollm2-135m"}, "has embed_tokens.weight of shape"),
        ({"architecture": "llama9"}, "architecture is 'llama9'"),
        ({"slice": "v5e-16"}, "4 hosts, but this server runs on 1; start it on every host"),
        ({"slice": "v5e-4"}, "but here are 8 of cpu"),
        ({"mesh": "tensor=16"}, "needs 16 devices"),
        (
            {
                "draft_model": str(folder),
                "draft_architecture": "llama3.2-1b",
                "draft_tokens": 3,
            },
            "draft_architecture is llama3.2-1b, but .*tiny has embed_tokens.weight of shape",
        ),
    ):
        settings = Settings(models=(str(folder),), **changes)
        (source,) = given_sources(settings)
        with pytest.raises(ValueError, match=message):
            make_build(settings)(source)
    for changes, message in (
        ({"mesh": "4"}, "write axes and sizes"),
        ({"cache": "heap"}, "cache is 'heap'"),
        ({"quantization": "int8-static"}, "ranges of activations"),
        ({"piece_tokens": 40}, "multiple of block_size"),
    ):
        with pytest.raises(ValueError, match=message):
            make_build(Settings(models=(str(folder),), **changes))
