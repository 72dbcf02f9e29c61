"""When blocks run out, or someone more urgent comes, the answer goes on where it was."""

import pytest

from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.engine.request import Request
from infer.params import SamplingParams
from tests.infer.engine.client import ask, submit
from tests.infer.engine.test_engine import WISHES, prompts_of
from tests.tiny import FAMILIES, tiny_params

OPTIONS = EngineOptions(max_slots=4, block_size=16, piece_tokens=32, num_blocks=12)


@pytest.fixture(scope="module")
def engine():
    config = FAMILIES["llama-gqa"].replace(eos_token_id=())
    engine = BatchingEngine((config, tiny_params(config), None), OPTIONS)
    engine.start()
    yield engine
    engine.stop(0)


def test_blocks_limit_the_context(engine):
    assert engine.max_context == 12 * 16


def test_answers_are_the_same_after_preemption(engine):
    prompts = prompts_of(30, 31, 45, 60, 20, 28)
    wishes = [each.replace(max_tokens=60) for each in WISHES]
    requests = [
        Request(f"p{number}", prompt, wish)
        for number, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True))
    ]
    together = ask(engine, *requests)
    statistics = engine.statistics()
    assert statistics["preemptions_total"] > 0
    assert statistics["blocks_free"] == 12
    assert statistics["compilations_total"] == 0
    for each, answer in zip(requests, together, strict=True):
        (alone,) = ask(engine, each)
        assert answer.token_ids() == alone.token_ids()


def test_the_urgent_take_the_place_of_the_patient(engine):
    patient = [
        Request(f"patient {n}", prompt, SamplingParams(seed=n, max_tokens=40), priority=5)
        for n, prompt in enumerate(prompts_of(9, 9, 9, 9))
    ]
    before = engine.statistics()["preemptions_total"]
    slow = [submit(engine, each) for each in patient]
    for answer in slow:
        answer.started.wait(60)
    (urgent,) = ask(
        engine, Request("urgent", (5, 6), SamplingParams(seed=1, max_tokens=5), priority=0)
    )
    assert engine.statistics()["preemptions_total"] > before
    assert any(not answer.ended.is_set() for answer in slow)
    assert len(urgent.token_ids()) == 5
    interrupted = [answer.wait().token_ids() for answer in slow]
    assert interrupted == [ask(engine, each)[0].token_ids() for each in patient]
