"""The engine against the offline generator: the same tokens, whoever else is there."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.engine.request import Failed, Finished, NotReadyError, QueueFullError, Request
from infer.generate import generate
from infer.params import SamplingParams
from tests.infer.engine.client import ask, submit
from tests.tiny import FAMILIES, tiny_params, tiny_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=20)
OPTIONS = EngineOptions(max_slots=4, block_size=16, piece_tokens=32, queue_limit=8)


@pytest.fixture(scope="module")
def tiny():
    config = FAMILIES["llama-gqa"].replace(eos_token_id=())
    return config, tiny_params(config), None


@pytest.fixture(scope="module")
def engine(tiny):
    engine = BatchingEngine(tiny, OPTIONS)
    engine.start()
    yield engine
    engine.stop(0)


def prompts_of(*lengths, seed=0):
    rows = tiny_tokens(len(lengths), 256, seed=seed)
    return [tuple(row[:n].tolist()) for row, n in zip(rows, lengths, strict=True)]


_ids = iter(range(10**9))


def request(prompt, params=GREEDY, **more):
    return Request(f"r{next(_ids)}", tuple(prompt), params, **more)


WISHES = [
    GREEDY,
    SamplingParams(seed=1, max_tokens=20),
    SamplingParams(seed=2, max_tokens=12, top_p=0.8, top_k=40, min_p=0.01, temperature=0.7),
    SamplingParams(
        seed=3, max_tokens=16, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2
    ),
    SamplingParams(seed=4, max_tokens=9, logit_bias={5: 4.0, 7: -100}, min_tokens=3),
    SamplingParams(temperature=0, max_tokens=18, logprobs=3),
]


@pytest.mark.slow
def test_a_full_batch_gives_what_the_offline_generator_gives(tiny, engine):
    prompts = prompts_of(3, 20, 40, 64, 70, 100)
    requests = [request(p, w) for p, w in zip(prompts, WISHES, strict=True)]
    answers = ask(engine, *requests)
    for prompt, wishes, answer in zip(prompts, WISHES, answers, strict=True):
        wanted = generate(tiny, [list(prompt)], wishes)[0]
        assert answer.token_ids() == wanted.token_ids
        assert answer.finish_reason() == wanted.finish_reason
        assert answer.last == Finished(
            len(prompt), len(wanted.token_ids), answer.last.cached_tokens
        )
        if wishes.logprobs is not None:
            got = [each for piece in answer.pieces for each in piece.logprobs]
            for one, other in zip(got, wanted.logprobs, strict=True):
                assert [t.token_id for t in one.top] == [t.token_id for t in other.top]
                np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-5)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 110), min_size=2, max_size=7),
    wishes=st.lists(st.sampled_from(WISHES), min_size=7, max_size=7),
    seed=st.integers(0, 3),
)
def test_neighbours_and_the_cache_change_nothing(engine, lengths, wishes, seed):  # R89
    prompts = prompts_of(*lengths, seed=seed)
    pairs = list(zip(prompts, wishes, strict=False))
    together = ask(engine, *(request(p, w) for p, w in pairs))
    for (prompt, wish), answer in zip(pairs, together, strict=True):
        (hot,) = ask(engine, request(prompt, wish))
        (cold,) = ask(engine, request(prompt, wish, tenant=f"nobody {next(_ids)}"))
        assert cold.start.cached_tokens == 0
        assert answer.token_ids() == hot.token_ids() == cold.token_ids()
    statistics = engine.statistics()
    assert statistics["blocks_free"] == statistics["blocks_total"]
    assert statistics["compilations_total"] == 0


def test_a_prefix_is_read_once_for_each_tenant_only(engine):  # R105
    shared, *tails = prompts_of(90, 5, 9, seed=11)
    (cold,) = ask(engine, request(shared + tails[0], tenant="a"))
    (hot,) = ask(engine, request(shared + tails[1], tenant="a"))
    (foreign,) = ask(engine, request(shared + tails[1], tenant="b"))
    assert (cold.start.cached_tokens, hot.start.cached_tokens) == (0, 80)
    assert foreign.start.cached_tokens == 0
    assert hot.token_ids() == foreign.token_ids()


def test_choices_differ_repeat_and_the_first_is_the_only_one(tiny, engine):  # R90
    (prompt,) = prompts_of(50, seed=5)
    wishes = SamplingParams(seed=7, n=6, max_tokens=15)
    first, again = ask(engine, request(prompt, wishes), request(prompt, wishes))
    (alone,) = ask(engine, request(prompt, wishes.replace(n=1)))
    texts = [tuple(first.token_ids(index)) for index in range(6)]
    assert len(set(texts)) == 6
    assert texts == [tuple(again.token_ids(index)) for index in range(6)]
    assert list(texts[0]) == alone.token_ids()
    assert first.last.completion_tokens == 90
    wanted = generate(tiny, [list(prompt)], wishes)
    assert texts == [tuple(output.token_ids) for output in wanted]


def test_a_prompt_is_scored_and_echoed(tiny, engine):  # R92
    (prompt,) = prompts_of(70, seed=6)
    wishes = SamplingParams(temperature=0, max_tokens=0, echo=True, logprobs=2)
    ask(engine, request(prompt))  # what the cache holds must not be left out
    (answer,) = ask(engine, request(prompt, wishes))
    wanted = generate(tiny, [list(prompt)], wishes)[0].prompt_logprobs
    got = answer.start.prompt_logprobs
    assert got[0] is None and len(got) == 70
    for one, other in zip(got[1:], wanted[1:], strict=True):
        assert one.token_id == other.token_id
        np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-5)
    assert answer.finish_reason() == "length" and answer.token_ids() == []


def test_no_tokens_are_wanted(engine):  # R95
    (answer,) = ask(engine, request((5, 6), SamplingParams(max_tokens=0)))
    assert answer.last == Finished(2, 0, 0)
    assert answer.finish_reason() == "length"


def test_the_context_limits_prompt_and_answer(engine):  # R94
    (whole,) = ask(engine, request(prompts_of(250)[0], GREEDY.replace(max_tokens=10**9)))
    assert len(whole.token_ids()) == engine.max_context - 250 == 6
    with pytest.raises(ValueError, match="257 tokens, but the context holds 256"):
        engine.submit(request(prompts_of(256)[0] + (5,)), print)


@pytest.mark.parametrize("prompt, message", [((), "no tokens"), ((5, 128), "id 128")])
def test_a_prompt_that_cannot_be_served_is_refused(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request(prompt), print)


def test_ids_are_unique_while_they_run(engine):
    long = request(prompts_of(9)[0], GREEDY.replace(max_tokens=200))
    answer = submit(engine, long)
    with pytest.raises(ValueError, match="unique"):
        engine.submit(long, print)
    engine.cancel(long.id)
    assert answer.wait().last.reason == "cancelled"


def test_a_cancelled_request_frees_all_it_held(engine):  # R97
    before = engine.statistics()["aborts_total"]
    doomed = request(prompts_of(9)[0], GREEDY.replace(max_tokens=240, n=3, temperature=1.0))
    answer = submit(engine, doomed)
    assert answer.started.wait(60)
    engine.cancel(doomed.id)
    assert isinstance(answer.wait().last, Failed)
    assert len(answer.token_ids()) < 240
    statistics = engine.statistics()
    assert statistics["aborts_total"] == before + 1
    assert statistics["requests_running"] == 0
    assert statistics["blocks_free"] == statistics["blocks_total"]
    engine.cancel(doomed.id)  # nothing happens
    engine.cancel("never heard of")


def test_the_queue_has_an_end(engine):  # R101
    prompts = prompts_of(*[5] * 50)
    answers, refused = [], 0
    for prompt in prompts:
        try:
            answers.append(submit(engine, request(prompt, GREEDY.replace(max_tokens=60))))
        except QueueFullError as error:
            refused += 1
            assert error.retry_after_seconds > 0
    assert refused and len(answers) >= OPTIONS.queue_limit
    assert all(isinstance(answer.wait().last, Finished) for answer in answers)


def test_a_draining_engine_ends_what_runs_and_takes_nothing_new(tiny):  # R102
    engine = BatchingEngine(tiny, OPTIONS)
    assert engine.state == "stopped"
    with pytest.raises(NotReadyError, match="stopped"):
        engine.submit(request((5,)), print)
    engine.start()
    assert engine.state == "ready"
    running = submit(engine, request((5, 6, 7), GREEDY.replace(max_tokens=100)))
    assert running.started.wait(60)
    stopping = threading.Thread(target=engine.stop, args=(60,))
    stopping.start()
    while engine.state == "ready":
        pass
    with pytest.raises(NotReadyError):
        engine.submit(request((5,)), print)
    stopping.join()
    assert isinstance(running.last, Finished) and engine.state == "stopped"
    engine.start()
    endless = submit(engine, request((5,), GREEDY.replace(max_tokens=250)))
    engine.stop(0)
    assert endless.wait().last.reason == "drained"


def test_a_broken_engine_says_so_and_starts_again(tiny, monkeypatch):
    engine = BatchingEngine(tiny, OPTIONS)
    engine.start()
    all_wait = threading.Event()

    def fail(*_):
        assert all_wait.wait(60)
        raise RuntimeError("out of order")

    monkeypatch.setattr(engine._runner, "begin_step", fail)
    answers = [submit(engine, request(prompt)) for prompt in prompts_of(*[5] * 7)]
    all_wait.set()
    for answer in answers:
        answer.wait()
        assert answer.last.reason == "engine" and "out of order" in answer.last.message
    assert engine.state == "broken"
    with pytest.raises(NotReadyError, match="broken"):
        engine.submit(request((5,)), print)
    monkeypatch.undo()
    engine.start()
    (answer,) = ask(engine, request((5, 6, 7)))
    assert isinstance(answer.last, Finished)
    assert answer.token_ids() == generate(tiny, [[5, 6, 7]], GREEDY)[0].token_ids
    engine.stop(0)


def test_the_next_step_begins_before_clients_hear_of_the_last(tiny, monkeypatch):
    """Steps that are ahead of their rows, alone and in a batch; the answers are the same."""
    engine = BatchingEngine(tiny, OPTIONS)
    engine.start()
    begin, told = engine._runner.begin_step, []

    def noted(choices, masks, drafts, newest=None):
        told.append(newest is not None)
        return begin(choices, masks, drafts, newest)

    monkeypatch.setattr(engine._runner, "begin_step", noted)
    lengths, limits = (9, 20, 40), (5, 30, 17)
    requests = [
        request(prompt, SamplingParams(seed=n, max_tokens=limit, frequency_penalty=n / 2))
        for n, (prompt, limit) in enumerate(zip(prompts_of(*lengths), limits, strict=True))
    ]
    answers = ask(engine, *requests)
    engine.stop(0)
    assert sum(told) > len(told) / 2
    for each, answer in zip(requests, answers, strict=True):
        wanted = generate(tiny, [list(each.prompt_token_ids)], each.params)[0]
        assert answer.token_ids() == wanted.token_ids


def test_what_outlasts_its_neighbours_runs_in_smaller_steps(engine, monkeypatch):
    """Also while nobody comes, and a step begins before the last one has been told."""
    rows, run = [], engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda plan: rows.append(plan.rows) or run(plan))
    wishes = [GREEDY.replace(max_tokens=count) for count in (4, 5, 6, 40)]
    prompts = prompts_of(5, 6, 7, 8, seed=5)
    last = ask(engine, *map(request, prompts, wishes))[-1]
    assert 0 < rows.count(4) < 12
    assert rows[-25:] == [2] * 25
    (alone,) = ask(engine, request(prompts[-1], wishes[-1]))
    assert alone.token_ids() == last.token_ids()


def test_an_embedding_is_the_mean_of_the_final_states(tiny, engine):
    from llama_jax.config import Compute
    from llama_jax.model import transformer

    config, params, _ = tiny
    (prompt,) = prompts_of(75, seed=9)
    got = engine.embed(prompt)
    hidden, _, _ = transformer.hidden_states(
        config, params, np.asarray([prompt]), compute=Compute()
    )
    np.testing.assert_allclose(got, np.asarray(hidden)[0].mean(axis=0), atol=1e-5)
