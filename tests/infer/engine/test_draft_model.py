"""A draft model changes the speed, never the answer nor its distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.engine.draft_model import check_draft
from infer.engine.engine import BatchingEngine
from infer.engine.memory import fitting_context, page_bytes, pages_and_context, room_bytes
from infer.engine.options import EngineOptions
from infer.engine.request import Request
from infer.engine.shapes import draft_slots
from infer.generate import generate
from infer.params import SamplingParams
from llama_jax.demo.make_tokenizer import FOLDER
from llama_jax.formats.tokenizer import load_tokenizer
from llama_jax.kernels.rounded import token_bytes
from llama_jax.model.transformer import forward
from tests.infer.engine.client import ask
from tests.infer.engine.test_engine import WISHES, prompts_of
from tests.infer.engine.test_pages import on_mesh
from tests.tiny import FAMILIES, tiny_config, tiny_params

pytestmark = pytest.mark.compiled_quickly

OPTIONS = EngineOptions(
    max_slots=4, block_size=16, piece_tokens=32, num_blocks=12, draft_tokens=3, prefill_share=1.0
)
CONFIG = FAMILIES["llama-gqa"].replace(eos_token_id=())
PARAMS = tiny_params(CONFIG)


def near(params, noise):
    """The same model, a little wrong everywhere: right about most tokens, not about all."""
    keys = iter(jax.random.split(jax.random.key(9), 100))
    return jax.tree.map(lambda w: w * (1 + noise * jax.random.normal(next(keys), w.shape)), params)


def started(draft, options=OPTIONS):
    engine = BatchingEngine((CONFIG, PARAMS, None), options, draft=draft)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def plain():
    engine = started(None, dataclasses.replace(OPTIONS, draft_tokens=0))
    yield engine
    engine.stop(0)


@pytest.fixture(scope="module")
def drafting():
    engine = started((CONFIG, near(PARAMS, 0.1), None))
    yield engine
    engine.stop(0)


def test_answers_are_those_of_the_large_model_alone(plain, drafting):
    """More choices than slots and fewer blocks than they want: rows come, go and move."""
    prompts = prompts_of(1, 2, 30, 70, 100, 40, 9)
    wishes = [*WISHES, SamplingParams(seed=9, temperature=1.2, n=2)]
    wishes = [
        each.replace(max_tokens=n)
        for each, n in zip(wishes, (60, 30, 50, 9, 20, 61, 40), strict=True)
    ]
    requests = [
        Request(f"d{n}", p, w) for n, (p, w) in enumerate(zip(prompts, wishes, strict=True))
    ]
    before = drafting.statistics()
    answers = [ask(engine, *requests) for engine in (plain, drafting)]
    for one, other in zip(*answers, strict=True):
        for index in {piece.index for piece in one.pieces}:
            assert one.token_ids(index) == other.token_ids(index)
            assert one.finish_reason(index) == other.finish_reason(index)
    statistics = drafting.statistics()
    assert statistics["preemptions_total"] > before["preemptions_total"]
    drafted, accepted = (
        statistics[name] - before[name] for name in ("draft_tokens_total", "accepted_tokens_total")
    )
    assert 0.2 < accepted / drafted < 1
    assert statistics["compilations_total"] == 0
    assert statistics["blocks_free"] == statistics["blocks_total"]


def test_on_a_mesh_each_device_has_the_whole_draft(plain):
    """Fewer pages than the choices want, too. Halves of matrices sum in other orders for other
    numbers of rows on a CPU, so the engine is not exact; no token hangs on it here."""
    model, mesh = on_mesh((CONFIG, PARAMS, None), tensor=2)
    options = dataclasses.replace(OPTIONS, piece_tokens=16, max_context=160, exact=False)
    engine = BatchingEngine(model, options, mesh=mesh, draft=(CONFIG, near(PARAMS, 0.1), None))
    engine.start()
    prompts = prompts_of(2, 30, 70, 90)
    requests = [
        Request(f"m{n}", prompt, wish.replace(max_tokens=60))
        for n, (prompt, wish) in enumerate(zip(prompts, WISHES, strict=False))
    ]
    wanted = [answer.token_ids() for answer in ask(plain, *requests)]
    assert wanted == [answer.token_ids() for answer in ask(engine, *requests)]
    statistics = engine.statistics()
    engine.stop(0)
    assert 0 < statistics["accepted_tokens_total"] < statistics["draft_tokens_total"]
    assert statistics["preemptions_total"] > 0
    assert statistics["compilations_total"] == 0
    assert statistics["blocks_free"] == statistics["blocks_total"]


def test_it_has_slots_for_steps_that_have_room_for_guesses(plain):
    """Rows that are left over come from slots it does not have, and are guessed for then."""
    options = dataclasses.replace(OPTIONS, max_slots=12, num_blocks=60)
    assert draft_slots(options) == 3  # steps of 2, 8 and 12 rows, and guesses for up to 6
    assert draft_slots(dataclasses.replace(options, max_slots=64)) == 3
    engine = started((CONFIG, near(PARAMS, 0.1), None), options)
    requests = [
        Request(f"s{n}", prompt, WISHES[n % len(WISHES)].replace(max_tokens=5 if n < 5 else 60))
        for n, prompt in enumerate(prompts_of(9, 20, 30, 40, 9, 31, 12))
    ]
    wanted = [answer.token_ids() for answer in ask(plain, *requests)]
    assert wanted == [answer.token_ids() for answer in ask(engine, *requests)]
    statistics = engine.statistics()
    engine.stop(0)
    assert 0.2 < statistics["accepted_tokens_total"] / statistics["draft_tokens_total"] < 1
    assert statistics["draft_tokens_total"] > 60
    assert statistics["compilations_total"] == 0


@pytest.mark.parametrize("wishes", [WISHES[0], SamplingParams(seed=3, temperature=1.5)])
def test_a_draft_of_the_same_weights_is_always_right(plain, wishes):
    """Sampled, too: it draws with the same random numbers."""
    engine = started((CONFIG, PARAMS, None))
    (prompt,) = prompts_of(40)
    request = Request("same", prompt, wishes.replace(max_tokens=41))
    (answer,) = ask(engine, request)
    statistics = engine.statistics()
    engine.stop(0)
    assert answer.token_ids() == ask(plain, request)[0].token_ids()
    assert statistics["accepted_tokens_total"] == statistics["draft_tokens_total"] >= 15


def test_the_distribution_is_that_of_the_large_model(drafting):
    """Chi-square of six tokens, most of them guessed, against their exact joint probabilities."""
    (prompt,) = prompts_of(20, seed=4)
    length, top, temperature, count = 6, 2, 1.5, 640
    wishes = SamplingParams(temperature=temperature, top_k=top, max_tokens=length)
    before = drafting.statistics()
    seen = {}
    for seed in range(count):
        (answer,) = ask(drafting, Request(f"x{seed}", prompt, wishes.replace(seed=seed)))
        tokens = tuple(answer.token_ids())
        seen[tokens] = seen.get(tokens, 0) + 1
    statistics = drafting.statistics()
    assert statistics["accepted_tokens_total"] - before["accepted_tokens_total"] > count
    exact = {(): 1.0}
    run = jax.jit(lambda tokens: forward(CONFIG, PARAMS, tokens))
    padded = np.zeros((top ** (length - 1), 32), np.int32)
    for place in range(length):
        begun, longer = list(exact), {}
        for row, begin in zip(padded, begun, strict=False):
            row[: 20 + place] = [*prompt, *begin]
        logits = np.asarray(run(padded))[:, 19 + place]
        for begin, row in zip(begun, logits, strict=False):
            best = np.argsort(-row)[:top]
            weights = np.exp((row[best] - row[best[0]]) / temperature)
            for token, share in zip(best.tolist(), weights / weights.sum(), strict=True):
                longer[(*begin, token)] = exact[begin] * share
        exact = longer
    assert set(seen) <= set(exact)
    expected = np.asarray(list(exact.values())) * count
    got = np.asarray([seen.get(tokens, 0) for tokens in exact])
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    got = np.append(got[~rare], got[rare].sum())
    statistic = ((got - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    # The 99.9th percentile of chi-square (Wilson and Hilferty 1931).
    freedom = len(expected) - 1
    assert freedom >= 10
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_a_draft_that_is_broken_or_short_only_costs_time(plain):
    params = jax.tree.map(lambda w: w * jnp.nan, PARAMS)
    short = CONFIG.replace(max_position_embeddings=32)
    (prompt,) = prompts_of(20)
    request = Request("broken", prompt, WISHES[1].replace(max_tokens=30))
    wanted = ask(plain, request)[0].token_ids()
    for draft in ((CONFIG, params, None), (short, PARAMS, None)):
        engine = started(draft)
        assert ask(engine, request)[0].token_ids() == wanted
        drafted = engine.statistics()["draft_tokens_total"]
        engine.stop(0)
        assert drafted == 0 if draft[0] is CONFIG else 0 < drafted <= 12


def test_models_of_other_vocabularies_are_refused():
    tokenizer = load_tokenizer(FOLDER)
    other = load_tokenizer(FOLDER)
    other.backend.add_tokens(["<more>"])
    config, bigger = tiny_config(vocab_size=264), tiny_config(vocab_size=320)
    check_draft(config, tokenizer, bigger, tokenizer)  # padded differently
    with pytest.raises(ValueError, match="1 ids differ .*None to the model and '<more>'"):
        check_draft(config, tokenizer, bigger, other)
    with pytest.raises(ValueError, match="the draft model has no tokenizer"):
        check_draft(config, tokenizer, bigger, None)
    with pytest.raises(ValueError, match="has 320 ids and the model 264"):
        check_draft(config, None, bigger, None)
    with pytest.raises(ValueError, match="draft_tokens is 0"):
        BatchingEngine((CONFIG, PARAMS, None), EngineOptions(), draft=(CONFIG, PARAMS, None))


def test_padded_vocabularies_may_differ():
    config, tokenizer = CONFIG.replace(vocab_size=264), load_tokenizer(FOLDER)
    draft, params = config.replace(vocab_size=300), tiny_params(config)
    model = config, params, tokenizer
    engine = BatchingEngine(model, OPTIONS, draft=(draft, tiny_params(draft), tokenizer))
    engine.start()
    (answer,) = ask(engine, Request("p", (5, 6, 7), WISHES[1]))
    drafted = engine.statistics()["draft_tokens_total"]
    engine.stop(0)
    assert answer.token_ids() == generate(model, [[5, 6, 7]], WISHES[1])[0].token_ids
    assert drafted > 0


def test_its_slots_count_as_memory():
    config = tiny_config(max_position_embeddings=2**24)
    alone = fitting_context(config, OPTIONS, "float32")
    beside = fitting_context(config, OPTIONS, "float32", draft=config)
    assert beside / alone == pytest.approx(9 / 14, rel=0.01)


def test_its_slots_count_as_memory_beside_pages():
    """Up to half of the room; more where the length of texts was said, and no pages then."""
    config = tiny_config(max_position_embeddings=2**24)
    options = dataclasses.replace(OPTIONS, cache="pages", num_blocks=None)
    room = room_bytes(jax.devices()[0])
    slots = token_bytes(config, "float32") * draft_slots(options)
    places = {"dtype": "float32", "mesh": None, "draft": config}
    num_pages, longest = pages_and_context(config, options, 2**24, **places)
    page = page_bytes(config, options, "float32", parts=1, kernel=False)
    assert slots * longest == pytest.approx(room / 2, rel=0.01)
    assert num_pages * page + slots * longest == pytest.approx(room, rel=0.2)
    assert num_pages * page + slots * longest <= room
    asked = dataclasses.replace(options, max_context=2**24)
    with pytest.raises(ValueError, match="keys and values, 5 slots of 16777216 tokens, take"):
        pages_and_context(config, asked, 2**24, **places)
    told = dataclasses.replace(asked, num_blocks=12)
    assert pages_and_context(config, told, 2**24, **places) == (12, 12 * 16)
