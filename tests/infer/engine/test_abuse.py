"""Many requests of every kind, with cancellations and faults of clients: nothing stays behind."""

import gc
import random

import pytest

from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.engine.request import Failed, Finished, QueueFullError, Request
from infer.params import SamplingParams
from tests.infer.engine.client import ask, submit
from tests.infer.engine.test_engine import prompts_of
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly


@pytest.fixture(scope="module")
def engine():
    config = FAMILIES["llama-gqa"]
    options = EngineOptions(
        max_slots=4, block_size=16, piece_tokens=32, num_blocks=24, queue_limit=20, draft_tokens=2
    )
    engine = BatchingEngine((config, tiny_params(config), None), options)
    engine.start()
    yield engine
    engine.stop(0)


def wishes(rng):
    return SamplingParams(
        temperature=rng.choice([0, 0.7, 1.5]),
        seed=rng.choice([None, 5]),
        max_tokens=rng.randint(0, 30),
        n=rng.choice([1, 1, 1, 3]),
        logprobs=rng.choice([None, None, 0, 4]),
        echo=rng.random() < 0.2,
        top_p=rng.choice([1.0, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logit_bias=rng.choice([{}, {9: 5.0}]),
        min_tokens=0,
    )


@pytest.mark.slow
def test_everything_is_free_after_a_storm(engine):
    rng = random.Random(1)
    prompts = prompts_of(*[rng.randint(1, 120) for _ in range(12)])
    answers, refused = [], 0
    for number in range(250):
        request = Request(
            f"storm {number}",
            rng.choice(prompts),
            wishes(rng),
            tenant=rng.choice(["a", "b"]),
            priority=rng.randint(0, 1),
        )
        try:
            answers.append(submit(engine, request))
        except QueueFullError:
            refused += 1
            answers[-1].wait()
        if rng.random() < 0.3:
            engine.cancel(f"storm {rng.randint(0, number)}")
    for answer in answers:
        kinds = [type(event) for event in answer.wait().events]
        assert kinds.count(Finished) + kinds.count(Failed) == 1
        assert kinds[-1] in (Finished, Failed)
        if kinds[-1] is Failed:
            assert answer.last.reason == "cancelled", answer.last
    statistics = engine.statistics()
    assert refused and statistics["aborts_total"]
    assert statistics["blocks_free"] == statistics["blocks_total"] == 24
    assert statistics["requests_running"] == statistics["requests_waiting"] == 0
    assert statistics["compilations_total"] == 0
    assert engine.state == "ready"
    gc.collect()
    left = [each for each in gc.get_objects() if type(each) is Request]
    assert len(left) < 10  # what this test still holds, no more


def test_a_client_whose_callback_fails_harms_nobody_else(engine, caplog):
    def fail(event):
        raise OSError("the client is gone")

    engine.submit(Request("gone", (5, 6), SamplingParams(max_tokens=100)), fail)
    (other,) = ask(engine, Request("other", (5, 6), SamplingParams(seed=1, max_tokens=20)))
    assert isinstance(other.last, Finished)
    assert "the callback of request gone failed" in caplog.text
    assert engine.state == "ready" and engine.statistics()["requests_running"] == 0


def test_a_request_that_forbids_every_token_is_refused(engine):
    ids = dict.fromkeys(range(128), -100.0)
    with pytest.raises(ValueError, match="forbids every token"):
        submit(engine, Request("b", (5,), SamplingParams(logit_bias=ids, max_tokens=5)))
    (fine,) = ask(engine, Request("f", (5,), SamplingParams(seed=1, max_tokens=5, ignore_eos=True)))
    assert len(fine.token_ids()) == 5
