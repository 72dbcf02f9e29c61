"""Guessed tokens change the speed, never the answer."""

import pytest

from infer.engine.drafts import look_up
from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.engine.request import Request
from infer.params import SamplingParams
from tests.infer.engine.client import ask
from tests.infer.engine.test_engine import WISHES, prompts_of
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly

PLAIN = EngineOptions(max_slots=8, block_size=16, piece_tokens=32)
DRAFTING = EngineOptions(max_slots=8, block_size=16, piece_tokens=32, draft_tokens=3)


@pytest.mark.parametrize(
    "tokens, found",
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1, 2]),  # the latest
        ([7, 1, 2, 9, 1, 2, 8, 7, 1, 2], [9, 1, 2]),  # the longest
        ([1, 2, 3], []),
        ([5], []),
        ([5, 5, 5], [5]),
    ],
)
def test_what_followed_last_time_is_guessed(tokens, found):
    assert look_up(tokens, 3) == found


def requests(prompts, wishes):
    return [Request(f"d{n}", p, w) for n, (p, w) in enumerate(zip(prompts, wishes, strict=True))]


def test_answers_are_the_same_with_and_without_guesses():
    config = FAMILIES["llama-gqa"].replace(eos_token_id=())
    model = config, tiny_params(config), None
    lengths = (3, 20, 40, 64, 70, 100)
    # A temperature near zero repeats itself, so that guesses are both right and wrong.
    wishes = [each.replace(max_tokens=100) for each in WISHES]
    wishes[1] = SamplingParams(seed=1, temperature=0.3, max_tokens=100, logprobs=2)
    answers = []
    for options in (PLAIN, DRAFTING):
        engine = BatchingEngine(model, options)
        engine.start()
        together = ask(engine, *requests(prompts_of(*lengths), wishes))
        (alone,) = ask(engine, *requests(prompts_of(20), [wishes[0]]))
        answers.append([answer.token_ids() for answer in (*together, alone)])
        statistics = engine.statistics()
        engine.stop(0)
        assert statistics["compilations_total"] == 0
        assert statistics["blocks_free"] == statistics["blocks_total"]
    assert answers[0] == answers[1]
    assert 0 < statistics["accepted_tokens_total"] < statistics["draft_tokens_total"]
