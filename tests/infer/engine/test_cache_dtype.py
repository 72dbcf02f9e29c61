"""A cache of int8 or bfloat16: the answers of the offline generator, whoever else is there."""

import dataclasses

import jax
import numpy as np
import pytest

from infer.engine import placement
from infer.engine.engine import BatchingEngine
from infer.engine.memory import fitting_context
from infer.engine.options import EngineOptions
from infer.engine.request import Failed, Request
from infer.generate import generate
from llama_jax.config import Compute
from llama_jax.mesh.sharding import shardings
from tests.infer.engine.client import ask
from tests.infer.engine.test_engine import WISHES, prompts_of
from tests.tiny import FAMILIES, tiny_config, tiny_params

pytestmark = pytest.mark.compiled_quickly

OPTIONS = EngineOptions(max_slots=4, block_size=16, piece_tokens=32, num_blocks=12)


@pytest.fixture(
    scope="module", params=["int8 slots", "bfloat16 slots", "int8 pages", "int8 pages on a mesh"]
)
def served(request):
    config = FAMILIES["llama-gqa"].replace(eos_token_id=())
    model = config, tiny_params(config), None
    dtype, cache, *meshed = request.param.split(" ")
    compute, mesh, params = Compute(cache_dtype=dtype), None, model[1]
    if meshed:
        mesh = placement.serving_mesh({"tensor": 2})
        params = jax.device_put(params, shardings(config, params, mesh, placement.RULES))
    engine = BatchingEngine(
        (config, params, None),
        dataclasses.replace(OPTIONS, cache=cache),
        compute=compute,
        mesh=mesh,
    )
    engine.start()
    yield model, engine, compute
    engine.stop(0)


@pytest.mark.slow
def test_neighbours_preemption_and_the_cache_change_nothing(served):
    model, engine, compute = served
    prompts = prompts_of(30, 31, 45, 60, 20, 28)
    requests = [
        Request(f"p{n}", prompt, wishes.replace(max_tokens=60))
        for n, (prompt, wishes) in enumerate(zip(prompts, WISHES, strict=True))
    ]
    together = ask(engine, *requests)
    statistics = engine.statistics()
    assert statistics["preemptions_total"] > 0 and statistics["compilations_total"] == 0
    for each, answer in zip(requests, together, strict=True):
        ask(engine, each)
        (hot,) = ask(engine, each)
        assert hot.start.cached_tokens > 0
        assert answer.token_ids() == hot.token_ids()
        wanted = generate(model, [list(each.prompt_token_ids)], each.params, compute=compute)[0]
        assert answer.token_ids() == wanted.token_ids
    assert engine.statistics()["blocks_free"] == 12


def test_more_tokens_fit_into_the_same_memory():
    config = tiny_config(max_position_embeddings=2**24, head_dim=64)
    options = EngineOptions(max_slots=4)
    wide, narrow = (fitting_context(config, options, dtype) for dtype in ("float32", "int8"))
    assert narrow / wide == pytest.approx(256 / 68, rel=0.01)


@pytest.mark.parametrize("dtype, cache", [("int8", "slots"), ("int8", "pages"), (None, "slots")])
def test_what_is_not_finite_reaches_nobody_else(dtype, cache):
    config = FAMILIES["llama-gqa"].replace(eos_token_id=())
    params = tiny_params(config)
    table = np.array(params["embed_tokens"]["weight"])
    table[9] = np.nan
    params["embed_tokens"]["weight"] = table
    model = config, params, None
    options = dataclasses.replace(OPTIONS, cache=cache)
    engine = BatchingEngine(model, options, compute=Compute(cache_dtype=dtype))
    engine.start()
    good = Request("good", (5, 6, 7), WISHES[0])
    (before,) = ask(engine, good)
    bad, beside = ask(engine, Request("bad", (5, 9, 7), WISHES[0]), good)
    assert isinstance(bad.last, Failed) and "NaN" in bad.last.message
    (after,) = ask(engine, good)
    engine.stop(0)
    assert before.token_ids() == beside.token_ids() == after.token_ids()
