"""Rotary frequencies and angles against published values and transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_jax.config import RopeScaling
from llama_jax.model import rope
from tests.reference import reference_config
from tests.tiny import tiny_config

LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


@pytest.mark.parametrize(
    ("theta", "position", "expected"),
    [
        (10000.0, 4095, [-0.065976, -0.742366, -0.089910, 0.890259]),
        (500000.0, 8191, [-0.646390, 0.977394, 0.823951, 0.999798]),
    ],
)
def test_angles_at_far_positions(theta, position, expected):
    config = tiny_config(head_dim=128, rope_theta=theta, dtype="bfloat16")
    cos, sin = rope.angles(config, jnp.asarray([[position]]))
    np.testing.assert_allclose(cos[0, 0, jnp.asarray([0, 1, 2, 63])], expected, atol=2e-4)
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, atol=1e-6)


def test_llama3_frequencies():
    config = tiny_config(head_dim=128, rope_theta=500000.0, rope_scaling=LLAMA3)
    expected = {
        0: 1.0,
        28: 3.21144599e-3,
        29: 2.16657076e-3,
        30: 1.37189357e-3,
        32: 5.24846161e-4,
        34: 1.78507813e-4,
        35: 9.55621235e-5,
        63: 3.06892599e-7,
    }
    got = rope.inverse_frequencies(config)
    for index, value in expected.items():
        np.testing.assert_allclose(got[index], value, rtol=1e-5)
    # The scaling holds from the first position on, not only past the original context.
    cos, _ = rope.angles(config, jnp.asarray([[3]]))
    np.testing.assert_allclose(cos[0, 0, 29], np.cos(3 * expected[29]), atol=1e-7)


@pytest.mark.parametrize("theta", [10000.0, 0.5])
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(rope_type="linear", factor=4.0),
        LLAMA3,
        RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        RopeScaling(rope_type="yarn", factor=8.0, beta_fast=16.0, beta_slow=2.0),
        RopeScaling(rope_type="yarn", factor=8.0, beta_fast=1.0, beta_slow=32.0),
        RopeScaling(rope_type="yarn", factor=8.0, beta_fast=4.0, beta_slow=4.0, truncate=False),
        RopeScaling(rope_type="yarn", factor=8.0, attention_factor=1.3, truncate=False),
        RopeScaling(rope_type="yarn", factor=8.0, mscale=0.7, mscale_all_dim=0.9),
    ],
)
def test_scalings_equal_transformers(scaling, theta):
    config = tiny_config(head_dim=64, rope_theta=theta, rope_scaling=scaling)
    reference = reference_config(config)
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](reference, device="cpu")
    np.testing.assert_allclose(
        rope.inverse_frequencies(config), frequencies.double().numpy(), rtol=2e-6
    )
    np.testing.assert_allclose(rope.attention_factor(config), factor, rtol=1e-6)


def test_integer_and_float_theta_give_the_same_bits():
    whole, real = tiny_config(rope_theta=1000000), tiny_config(rope_theta=1000000.0)
    positions = jnp.arange(64)[None]
    np.testing.assert_array_equal(rope.angles(whole, positions)[0], rope.angles(real, positions)[0])


def test_dynamic_scaling_grows_past_the_trained_length_row_by_row():
    config = tiny_config(
        max_position_embeddings=16, rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0)
    )
    plain = tiny_config(max_position_embeddings=16)
    short, long = jnp.arange(12)[None], jnp.arange(12)[None] + 20
    both = jnp.concatenate([short, long])
    cos, _ = rope.angles(config, both)
    np.testing.assert_array_equal(cos[0], rope.angles(plain, short)[0][0])
    np.testing.assert_allclose(cos[1], rope.angles(config, long)[0][0], atol=0)
    assert float(jnp.abs(cos[1] - rope.angles(plain, long)[0][0]).max()) > 0.1


def test_rotation_rounds_once_from_float32():
    config = tiny_config(head_dim=128)
    x = jnp.ones((1, 1, 1, 128), jnp.bfloat16)
    cos, sin = rope.angles(config, jnp.asarray([[4095]]))
    wide = rope.rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(rope.rotate(x, cos, sin), wide.astype(jnp.bfloat16))
