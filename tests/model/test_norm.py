"""The norm, whose sums must not depend on how many rows there are."""

import jax
import numpy as np
import pytest

from llama_jax.model.transformer import RMSNorm
from tests.tiny import tiny_config


@pytest.mark.parametrize("width", [64, 192, 576, 4096])
def test_few_rows_have_the_bits_they_have_among_many(width):
    config = tiny_config(hidden_size=width)
    rng = np.random.default_rng(width)
    scale = rng.normal(size=width).astype(np.float32)
    rows = rng.normal(size=(72, width)).astype(np.float32)
    norm = jax.jit(lambda x: RMSNorm(config, {"weight": scale})(x))
    wanted = np.asarray(norm(rows))
    mean = (rows.astype(np.float64) ** 2).mean(-1, keepdims=True)
    exact = rows / np.sqrt(mean + config.rms_norm_eps) * scale
    np.testing.assert_allclose(wanted, exact, rtol=1e-5, atol=1e-6)
    for count in (1, 2, 3, 5, 7, 8, 9, 16, 24, 32):
        np.testing.assert_array_equal(norm(rows[:count]), wanted[:count], str(count))
        split = norm(rows[:count].reshape(count, 1, width))
        np.testing.assert_array_equal(split[:, 0], wanted[:count], str(count))
