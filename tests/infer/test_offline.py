"""A list of prompts on the engine gives what the offline generator gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from infer.batch import Batch
from infer.generate import generate
from infer.offline import complete
from infer.params import SamplingParams
from llama_jax.config import RopeScaling
from llama_jax.demo.make_tokenizer import FOLDER
from llama_jax.formats.tokenizer import load_tokenizer
from tests.tiny import tiny_config, tiny_params

pytestmark = pytest.mark.compiled_quickly

CONFIG = tiny_config(vocab_size=264, bos_token_id=None, eos_token_id=(258,))
TEXTS = ["a", "the cat sat on the mat", "x" * 70, "the cat sat on the sofa", "1 2 3 4", "b"]


@pytest.fixture(scope="module")
def model():
    return CONFIG, tiny_params(CONFIG), load_tokenizer(FOLDER)


def alike(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert (one.prompt_index, one.index, one.prompt) == (
            other.prompt_index,
            other.index,
            other.prompt,
        )
        assert one.token_ids == other.token_ids and one.text == other.text
        assert one.finish_reason == other.finish_reason
        assert one.prompt_token_ids == other.prompt_token_ids
        for name in ("logprobs", "prompt_logprobs"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None)
            for a, b in zip(mine or [], theirs or [], strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert a.token_id == b.token_id and a.bytes == b.bytes
                    np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-5)
    assert got.stats.new_tokens == wanted.stats.new_tokens and got.tokens_per_second > 0


def test_more_prompts_than_slots(model):
    params = SamplingParams(
        seed=7,
        max_tokens=20,
        n=2,
        repetition_penalty=1.2,
        stop=("e", "\x01"),
        logprobs=2,
        echo=True,
    )
    alike(complete(model, TEXTS, params, batch_size=2), generate(model, TEXTS, params))


def test_conversations(model):
    talks = [[{"role": "user", "content": text}] for text in TEXTS[:2]]
    params = SamplingParams(temperature=0, max_tokens=5)
    alike(
        complete(model, talks, params, chat=True, batch_size=8),
        generate(model, talks, params, chat=True),
    )


def test_lengths_that_change_angles_go_the_other_way(monkeypatch):
    scaling = RopeScaling("dynamic", 2.0, original_max_position_embeddings=16)
    config = tiny_config(rope_scaling=scaling, max_position_embeddings=64, eos_token_id=())
    model = config, tiny_params(config), None
    prompts, params = [[5, 6, 7], list(range(3, 40))], SamplingParams(temperature=0, max_tokens=6)
    expected, sizes = generate(model, prompts, params), []
    run = Batch.run
    monkeypatch.setattr(Batch, "run", lambda batch: sizes.append(len(batch.rows)) or run(batch))
    alike(complete(model, prompts, params, batch_size=1), expected)
    assert sizes == [1, 1]


def test_what_is_wrong_is_said(model):
    config, params, tokenizer = model
    wishes = SamplingParams(temperature=0, max_tokens=4)
    with pytest.raises(ValueError, match="prompt 1 has 300 tokens, but the context holds 256"):
        complete(model, ["a", [5] * 300], wishes, batch_size=2)
    broken = {**params, "norm": {"weight": params["norm"]["weight"] * jnp.nan}}
    with pytest.raises(RuntimeError, match="prompt 0: no token can be chosen .* NaN"):
        complete((config, broken, tokenizer), ["a"], wishes, batch_size=2)
