"""The engine over pages: the same tokens as offline, whatever happens to the pages."""

import jax
import numpy as np
import pytest

from infer.engine import placement
from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions, parse_mesh
from infer.engine.request import Request
from infer.generate import generate
from infer.params import SamplingParams
from llama_jax.mesh.sharding import shardings
from tests.infer.engine.client import ask, submit
from tests.tiny import FAMILIES, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

GREEDY = SamplingParams(temperature=0, max_tokens=20)
OPTIONS = EngineOptions(max_slots=4, block_size=16, piece_tokens=32, cache="pages")
WISHES = [
    GREEDY,
    SamplingParams(seed=1, max_tokens=20),
    SamplingParams(
        seed=3, max_tokens=16, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2
    ),
    SamplingParams(seed=4, max_tokens=9, logit_bias={5: 4.0, 7: -100}, min_tokens=3),
    SamplingParams(seed=5, n=3, max_tokens=10),
    SamplingParams(temperature=0, max_tokens=18, logprobs=3),
]

_ids = iter(range(10**9))


def request(prompt, params=GREEDY, **more):
    return Request(f"r{next(_ids)}", tuple(prompt), params, **more)


def prompts_of(*lengths, seed=0):
    rows = tiny_tokens(len(lengths), 256, seed=seed)
    return [tuple(row[:n].tolist()) for row, n in zip(rows, lengths, strict=True)]


def tiny_model(name, **changes):
    config = FAMILIES[name].replace(eos_token_id=(), **changes)
    return config, tiny_params(config), None


def on_mesh(model, **sizes):
    """The engine's arguments for a model on emulated devices."""
    config, params, tokenizer = model
    mesh = placement.serving_mesh(sizes)
    placed = jax.device_put(params, shardings(config, params, mesh, placement.RULES))
    return (config, placed, tokenizer), mesh


def check_answers(model, engine, prompts, wishes):
    answers = ask(engine, *(request(p, w) for p, w in zip(prompts, wishes, strict=True)))
    for prompt, wish, answer in zip(prompts, wishes, answers, strict=True):
        for index, wanted in enumerate(generate(model, [list(prompt)], wish)):
            assert answer.token_ids(index) == wanted.token_ids


def check_all_free(engine):
    statistics = engine.statistics()
    assert statistics["blocks_free"] == statistics["blocks_total"]
    assert statistics["compilations_total"] == 0


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama-gqa")


@pytest.fixture(scope="module")
def engine(tiny):
    engine = BatchingEngine(tiny, OPTIONS)
    engine.start()
    yield engine
    engine.stop(0)


def test_a_full_batch_gives_what_the_offline_generator_gives(tiny, engine):
    check_answers(tiny, engine, prompts_of(3, 20, 40, 64, 70, 100), WISHES)
    check_all_free(engine)


def test_neighbours_and_the_cache_change_nothing(engine):
    prompts = prompts_of(33, 80, 50, 7, 64, 90, seed=2)
    together = ask(engine, *(request(p, w) for p, w in zip(prompts, WISHES, strict=True)))
    for prompt, wish, answer in zip(prompts, WISHES, together, strict=True):
        (hot,) = ask(engine, request(prompt, wish))
        (cold,) = ask(engine, request(prompt, wish, tenant=f"nobody {next(_ids)}"))
        assert hot.start.cached_tokens == (len(prompt) - 1) // 16 * 16
        assert cold.start.cached_tokens == 0
        for index in range(wish.n):
            tokens = answer.token_ids(index)
            assert tokens == hot.token_ids(index) == cold.token_ids(index)
    check_all_free(engine)


def test_a_cancelled_request_leaves_its_pages_to_others(tiny, engine):
    doomed = request(prompts_of(60, seed=3)[0], GREEDY.replace(max_tokens=180, n=3, temperature=1))
    answer = submit(engine, doomed)
    assert answer.started.wait(60)
    engine.cancel(doomed.id)
    assert answer.wait().last.reason == "cancelled"
    check_all_free(engine)
    check_answers(tiny, engine, prompts_of(60, 90, seed=4), [GREEDY, GREEDY])


def test_what_a_prompt_is_embedded_with_is_free_again(tiny, engine):
    (prompt,) = prompts_of(75, seed=5)
    first = engine.embed(prompt)
    ask(engine, request(prompts_of(100, seed=6)[0]))
    np.testing.assert_array_equal(first, engine.embed(prompt))
    slots = BatchingEngine(tiny, EngineOptions(max_slots=1, piece_tokens=32))
    slots.start()
    np.testing.assert_allclose(first, slots.embed(prompt), atol=1e-5)
    slots.stop(0)
    check_all_free(engine)


@pytest.fixture(scope="module")
def small(tiny):
    """Half of the blocks that four choices want."""
    options = EngineOptions(
        max_slots=4, block_size=16, piece_tokens=32, num_blocks=16, cache="pages", draft_tokens=3
    )
    engine = BatchingEngine(tiny, options)
    engine.start()
    yield engine
    engine.stop(0)


def test_preempted_choices_go_on_where_they_were(tiny, small):
    wishes = [
        SamplingParams(temperature=0, max_tokens=70),
        SamplingParams(seed=1, max_tokens=60),
        SamplingParams(seed=2, max_tokens=64, repetition_penalty=1.2),
        SamplingParams(temperature=0, max_tokens=70, frequency_penalty=0.3),
    ]
    check_answers(tiny, small, prompts_of(40, 50, 60, 64, seed=7), wishes)
    statistics = small.statistics()
    assert statistics["preemptions_total"] > 0
    assert statistics["accepted_tokens_total"] > 0  # pages hold guesses that were wrong, too
    check_all_free(small)


@pytest.mark.parametrize("name", ["mistral", "dynamic-rope"])
def test_other_families(name):
    model = tiny_model(name)
    options = EngineOptions(max_slots=2, block_size=8, piece_tokens=16, cache="pages")
    engine = BatchingEngine(model, options)
    engine.start()
    longest = engine.max_context
    lengths = [min(n, longest - 6) for n in (5, 40)]
    check_answers(model, engine, prompts_of(*lengths), [GREEDY.replace(max_tokens=6)] * 2)
    engine.stop(0)


def test_on_a_mesh_with_heads_dealt_out_and_divided_further():
    """Two pairs of devices: each has one of two key/value heads, and half of its query heads."""
    model = tiny_model("mixtral")
    on_devices, mesh = on_mesh(model, tensor=2, fsdp=2)
    options = EngineOptions(max_slots=2, block_size=16, piece_tokens=16)
    engine = BatchingEngine(on_devices, options, mesh=mesh)
    engine.start()
    pages = engine._runner._cache.pages
    assert {shard.data.shape[2] for shard in pages.addressable_shards} == {pages.shape[2] // 2}
    check_answers(model, engine, prompts_of(5, 40), WISHES[:2])
    check_all_free(engine)
    engine.stop(0)


def test_slots_on_a_mesh_are_refused(tiny):
    model, mesh = on_mesh(tiny, tensor=2)
    with pytest.raises(ValueError, match="cache is slots"):
        BatchingEngine(model, EngineOptions(cache="slots"), mesh=mesh)


def test_a_mesh_that_does_not_divide_the_heads_is_refused(tiny):
    config = tiny[0]
    mesh = placement.serving_mesh({"tensor": 4})
    with pytest.raises(ValueError, match="kv_heads"):
        placement.check(config, mesh)
    mesh = placement.serving_mesh({"tensor": 1, "fsdp": 2})
    with pytest.raises(ValueError, match=r"mesh\.tensor must divide 2"):
        placement.check(config, mesh)


@pytest.mark.parametrize(
    "text, message",
    [
        ("tensor", "write axes and sizes"),
        ("tensor=0", "write axes and sizes"),
        ("expert=2", "'expert' does not help"),
        ("tensr=2", "'tensr' is unknown"),
        ("tensor=2,tensor=2", "names tensor twice"),
    ],
)
def test_a_mesh_is_spelt_in_axes_that_help(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_devices_must_be_there():
    assert placement.serving_mesh({"tensor": 8}).size == 8
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
        placement.serving_mesh({"tensor": 16})
    with pytest.raises(ValueError, match="needs 12 devices, but there are 8"):
        placement.serving_meshes({"tensor": 4, "data": 3})
    first, second = placement.serving_meshes({"tensor": 4, "data": 2})
    assert first.shape == second.shape and first.shape["tensor"] == 4
    assert not set(first.devices.flat) & set(second.devices.flat)
