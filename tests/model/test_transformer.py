"""Logits equal transformers' for every family and head layout; the ways of running agree."""

import jax
import numpy as np
import pytest

from llama_jax.model import transformer
from tests.reference import reference_logits, reference_model
from tests.tiny import FAMILIES, tiny_params, tiny_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    config = FAMILIES[family]
    params = tiny_params(config)
    tokens = tiny_tokens(1, 40)
    expected = reference_logits(reference_model(config, params), tokens)
    got = jax.jit(lambda p, t: transformer.forward(config, p, t))(params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    unrolled = transformer.forward(config, transformer.unstack_layers(params), tokens)
    np.testing.assert_allclose(unrolled, got, atol=2e-6, rtol=0)
