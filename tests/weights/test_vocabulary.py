"""New rows are appended, old ones stay bit for bit; an untied head starts as the embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import transformer
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.vocabulary import resize_vocabulary, untie_embeddings
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens


def test_untying_changes_nothing_at_first():
    config = FAMILIES["llama-tied"]
    params = tiny_params(config)
    untied, apart = untie_embeddings(config, params)
    assert not untied.tie_word_embeddings
    tokens = tiny_tokens()
    np.testing.assert_array_equal(
        transformer.forward(untied, apart, tokens), transformer.forward(config, params, tokens)
    )
    with pytest.raises(ValueError, match="not tied"):
        untie_embeddings(untied, apart)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied"])
def test_resizing_keeps_the_old_rows(family):
    config = FAMILIES[family]
    params = tiny_params(config)
    names = ["embed_tokens"] if config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    rows = {f"{name}.weight": jnp.full((4, 64), 0.5 + i) for i, name in enumerate(names)}
    larger, resized = resize_vocabulary(config, params, rows)
    assert larger.vocab_size == 132
    for i, name in enumerate(names):
        np.testing.assert_array_equal(resized[name]["weight"][:128], params[name]["weight"])
        assert (np.asarray(resized[name]["weight"][128:]) == 0.5 + i).all()
    tokens = tiny_tokens()
    np.testing.assert_allclose(
        transformer.forward(larger, resized, tokens)[..., :128],
        transformer.forward(config, params, tokens),
        atol=1e-6,
    )


def test_wrong_rows_are_refused():
    config = tiny_config()
    params = tiny_params(config)
    new = jnp.zeros((4, 64))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight and lm_head\.weight, but"):
        resize_vocabulary(config, params, {"embed_tokens.weight": new})
    both = {"embed_tokens.weight": new, "lm_head.weight": new[:3]}
    with pytest.raises(ValueError, match="numbers of new rows differ"):
        resize_vocabulary(config, params, both)
    both = {"embed_tokens.weight": new[:, :32], "lm_head.weight": new}
    with pytest.raises(ValueError, match=r"must be \[added, 64\]"):
        resize_vocabulary(config, params, both)
    lora = LoraConfig(target_modules=("lm_head",))
    adapted = add_lora(config, params, lora, jax.random.key(0))
    both = {"embed_tokens.weight": new, "lm_head.weight": new}
    with pytest.raises(ValueError, match="quantized or adapted"):
        resize_vocabulary(config, adapted, both)
