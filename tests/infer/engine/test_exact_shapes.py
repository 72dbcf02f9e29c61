"""Which shapes an engine uses, and that it compiles nothing once it has started."""

import numpy as np
import pytest

from infer.engine.engine import BatchingEngine
from infer.engine.memory import fitting_context, memory_bytes
from infer.engine.options import EngineOptions
from infer.engine.request import Request
from infer.engine.shapes import piece_shapes, row_shapes
from infer.generate import generate
from infer.params import SamplingParams
from tests.infer.engine.client import ask
from tests.tiny import FAMILIES, tiny_config, tiny_params

OPTIONS = EngineOptions(max_slots=8, block_size=16, piece_tokens=64, queue_limit=100)


@pytest.fixture(scope="module")
def engine():
    config = FAMILIES["llama-tied"].replace(eos_token_id=())
    engine = BatchingEngine((config, tiny_params(config), None), OPTIONS)
    engine.start()
    yield engine
    engine.stop(0)


def test_few_shapes():
    assert piece_shapes(128) == [32, 128] and piece_shapes(16) == [16]
    assert [row_shapes(n, exact=True) for n in (1, 2, 5, 16, 24, 64)] == [
        [2], [2], [2, 5], [2, 8, 16], [2, 8, 24], [2, 8, 24, 48, 64],
    ]  # fmt: skip
    assert row_shapes(16, exact=False) == [1, 8, 16]
    assert row_shapes(1, exact=False) == [1]


def test_a_lone_request_may_run_in_steps_of_one_row():
    config = FAMILIES["llama-tied"].replace(eos_token_id=())
    model = config, tiny_params(config), None
    options = EngineOptions(max_slots=4, block_size=16, piece_tokens=64, exact=False)
    engine = BatchingEngine(model, options)
    engine.start()
    wishes = SamplingParams(temperature=0, max_tokens=12)
    requests = [Request(f"r{n}", (5, 6, 7 + n), wishes) for n in range(3)]
    alone = [ask(engine, request)[0].token_ids() for request in requests]
    together = [answer.token_ids() for answer in ask(engine, *requests)]
    assert engine.statistics()["compilations_total"] == 0
    engine.stop(0)
    wanted = [output.token_ids for output in generate(model, [[5, 6, 7], [5, 6, 8], [5, 6, 9]],
                                                      wishes)]  # fmt: skip
    assert alone == together == wanted  # these have no near ties


def test_nothing_is_compiled_after_the_start(engine):  # R104
    rng = np.random.default_rng(0)
    requests = [
        Request(
            f"r{length}",
            tuple(rng.integers(3, 128, length).tolist()),
            SamplingParams(
                temperature=float(rng.choice([0, 0.5, 1.3])),
                top_p=float(rng.uniform(0.1, 1)),
                top_k=int(rng.integers(0, 60)),
                min_p=float(rng.choice([0, 0.1])),
                repetition_penalty=float(rng.choice([1, 1.2])),
                frequency_penalty=float(rng.choice([0, 0.4])),
                logprobs=None if length % 3 else int(length % 5),
                n=1 + length % 3,
                seed=length,
                max_tokens=5,
            ),
        )
        for length in range(1, 101)
    ]
    for begin in range(0, 100, 20):  # from one row to all of them
        ask(engine, *requests[begin : begin + 1])
        ask(engine, *requests[begin + 1 : begin + 20])
    statistics = engine.statistics()
    assert statistics["compilations_total"] == 0
    assert statistics["generated_tokens_total"] > 100


@pytest.fixture
def restarted(engine, monkeypatch):
    """The engine's runner after a start on a machine where `change(rows, length)` says by which
    factor logits differ."""
    trial = engine._runner._trial

    def restart(change):
        monkeypatch.setattr(
            engine._runner,
            "_trial",
            lambda rows, length, begin: trial(rows, length, begin) * change(rows, length),
        )
        engine.stop(0)
        engine.start()
        return engine._runner

    yield restart
    monkeypatch.undo()
    engine.stop(0)
    engine.start()


def test_a_shape_that_sums_otherwise_is_left_out(engine, restarted, caplog):
    assert engine._runner.shapes.rows == [2, 8], caplog.text
    runner = restarted(lambda rows, length: 1.5 if rows == 2 else 1)
    assert runner.shapes.rows == [8]
    assert "steps of 2 rows are left out" in caplog.text
    ask(engine, Request("one", (5, 6), SamplingParams(seed=1, max_tokens=3)))
    assert engine.statistics()["compilations_total"] == 0


def test_few_rows_are_filled_up_where_few_tokens_sum_otherwise(engine, restarted, caplog):
    runner = restarted(lambda rows, length: 1 if rows * length >= 8 else 1.5)
    assert (
        runner.shapes.rows == [2, 8]
        and runner.shapes.lengths(2) == [4]
        and runner.shapes.lengths(8) == [1]
    )
    assert not caplog.text
    wishes = [SamplingParams(max_tokens=3), SamplingParams(seed=1, max_tokens=3, logprobs=2)]
    for number, params in enumerate(wishes):
        ask(engine, Request(f"r{number}", (5, 6), params))
    assert engine.statistics()["compilations_total"] == 0


def test_the_largest_shape_is_filled_up_too_where_all_are_small():
    config = FAMILIES["llama-tied"].replace(eos_token_id=())
    options = EngineOptions(max_slots=3, block_size=16, piece_tokens=64)
    engine = BatchingEngine((config, tiny_params(config), None), options)
    runner, trial = engine._runner, engine._runner._trial
    runner._trial = lambda rows, length, begin: (
        trial(rows, length, begin) * (1 if rows * length >= 8 else rows)
    )
    engine.start()
    assert [(rows, runner.shapes.lengths(rows)) for rows in runner.shapes.rows] == [
        (2, [4]),
        (3, [3]),
    ]
    requests = [Request(f"r{n}", (5, 6), SamplingParams(seed=n, max_tokens=3)) for n in range(3)]
    ask(engine, *requests)
    assert engine.statistics()["compilations_total"] == 0
    engine.stop(0)


def test_the_context_fits_into_an_eighth_of_the_memory():
    config = tiny_config(max_position_embeddings=2**24)
    options = EngineOptions(max_slots=4)
    tokens = fitting_context(config, options, "float32")
    token_bytes = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, size, bytes
    assert tokens % options.block_size == 0
    assert 0.9 < tokens * token_bytes * 9 / (memory_bytes() / 8) <= 1
    assert fitting_context(config, options, "bfloat16") >= 2 * tokens


def test_a_prompt_begun_from_the_cache_has_the_same_bits(engine):
    """The rest of a piece stands elsewhere in its step than when the whole piece is read."""
    engine.stop(0)
    runner = engine._runner
    tokens = np.random.default_rng(5).integers(3, 128, 64).tolist()
    runner.read(0, (), tokens, 0, 64)
    cold = np.asarray(runner.hidden)
    runner.save_blocks(0, [3, 4], 0, 2)
    runner.load_blocks(1, [3, 4])
    runner.read(1, (), tokens[32:], 32, 64)
    hot = np.asarray(runner.hidden)
    np.testing.assert_array_equal(hot[:32], cold[32:])
    runner.move_slot(1, 2, False)
    logits = np.asarray(runner._logits(8, 1, {n: (64, [9], ()) for n in (0, 1, 2)}, [-1] * 8))
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])
