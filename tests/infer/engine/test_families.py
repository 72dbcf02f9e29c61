"""Models that attend, rotate, route or store their weights in another way."""

import dataclasses

import pytest

from infer.engine.engine import BatchingEngine
from infer.engine.memory import check_context, longest_context
from infer.engine.options import EngineOptions
from infer.engine.request import Request
from infer.generate import generate
from infer.params import SamplingParams
from llama_jax.config import Compute
from llama_jax.presets import presets
from tests.infer.engine.client import ask
from tests.infer.engine.test_engine import prompts_of
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly

OPTIONS = EngineOptions(max_slots=2, block_size=16, piece_tokens=32)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "dynamic-rope", "bfloat16"])
def test_the_engine_gives_what_the_offline_generator_gives(family):
    compute = Compute(dtype="bfloat16") if family == "bfloat16" else Compute()
    config = FAMILIES.get(family, FAMILIES["llama-biases"]).replace(eos_token_id=())
    model = config, tiny_params(config), None
    engine = BatchingEngine(model, OPTIONS, compute=compute)
    engine.start()
    lengths = (3, 9) if engine.max_context < 64 else (30, 50)
    prompts = prompts_of(*lengths)
    wishes = SamplingParams(temperature=0, max_tokens=12)
    requests = [Request(f"{n}", prompt, wishes) for n, prompt in enumerate(prompts)]
    together = [answer.token_ids() for answer in ask(engine, *requests)]
    alone = [ask(engine, request)[0].token_ids() for request in requests]
    engine.stop(0)
    assert together == alone
    if family != "bfloat16":  # there the two sum in different orders, and ties are common
        wanted = generate(model, [list(prompt) for prompt in prompts], wishes, compute=compute)
        assert together == [output.token_ids for output in wanted]


def test_a_dynamically_scaled_context_ends_where_scaling_begins():
    config = FAMILIES["dynamic-rope"]
    engine = BatchingEngine((config, tiny_params(config), None), OPTIONS)
    assert engine.max_context == 16
    longer = dataclasses.replace(OPTIONS, max_context=17)
    with pytest.raises(ValueError, match="max_context is 17, but the model was made for 16 tokens"):
        BatchingEngine((config, tiny_params(config), None), longer)


def test_a_scaled_context_is_as_long_as_the_model_says_and_no_longer():
    # As published: the length with the scaling.
    assert longest_context(presets["llama3.1-8b"]) == 131072
    check_context(presets["llama3.1-8b"], 131072)
    with pytest.raises(ValueError, match="131073, but the model was made for 131072 tokens"):
        check_context(presets["llama3.1-8b"], 131073)
