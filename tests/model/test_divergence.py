"""Divergences against hand-computed numbers, padding of every kind, and what top-k keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax, softmax

from llama_jax.model.divergence import (
    divergences,
    same_ids,
    top_divergences,
    top_log_probs,
)

pytestmark = pytest.mark.compiled_quickly

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")


def rows(count=6, size=20, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(0, 2, (count, size)), jnp.float32) for _ in range(2)]


def test_the_directions_and_their_names():
    """R68."""
    student, teacher = jnp.asarray([0.0, 1.0, 0.0]), jnp.asarray([2.0, 0.0, 1.0])
    found = {kind: float(divergences(student, teacher, kind=kind)) for kind in KINDS}
    assert found["forward_kl"] == pytest.approx(0.629019, abs=1e-6)
    assert found["reverse_kl"] == pytest.approx(0.796453, abs=1e-6)
    p, q = softmax(teacher), softmax(student)
    m = (p + q) / 2
    js = 0.5 * (p * jnp.log(p / m)).sum() + 0.5 * (q * jnp.log(q / m)).sum()
    assert found["jensen_shannon"] == pytest.approx(float(js), abs=1e-6)


def test_the_temperature_and_its_square():
    """R67."""
    student, teacher = jnp.zeros(2), jnp.asarray([2.0, 0.0])

    def soft(student, temperature):
        return divergences(student, teacher, kind="forward_kl", temperature=temperature)

    assert float(soft(student, 2.0)) == pytest.approx(0.443776, abs=1e-6)
    assert float(soft(student, 1.0)) == pytest.approx(0.327813, abs=1e-6)
    # For small differences the gradient is (q - p) / V whatever the temperature.
    small = jnp.asarray([0.02, 0.0])
    sizes = [
        float(
            jnp.abs(
                jax.grad(lambda s, t=t: divergences(s, small, kind="forward_kl", temperature=t))(
                    student
                )
            ).max()
        )
        for t in (1.0, 2.0, 8.0)
    ]
    assert max(sizes) / min(sizes) < 1.001


def test_padding_of_the_vocabulary_is_removed():
    """R66: the teacher is wider than the student, and its third id stands for nothing."""
    student, teacher = same_ids(jnp.zeros(2), jnp.asarray([2.0, 0.0, 9.0]), 2)
    found = divergences(student, teacher, kind="forward_kl")
    assert float(found) == pytest.approx(0.32781, abs=1e-5)
    student, teacher = same_ids(jnp.asarray([0.0, 0.0, 3.0]), jnp.asarray([2.0, 0.0, 9.0, 1.0]), 2)
    for kind in KINDS:
        bare = divergences(jnp.zeros(2), jnp.asarray([2.0, 0.0]), kind=kind)
        assert float(divergences(student, teacher, kind=kind)) == pytest.approx(float(bare))
    gradient = jax.grad(lambda s: divergences(*same_ids(s, teacher, 2), kind="forward_kl"))(
        jnp.asarray([0.0, 0.0, 3.0])
    )
    assert np.isfinite(gradient).all() and float(gradient[2]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_at_distance_0_and_gradients_are_exact(kind):
    student, teacher = rows()
    zero = divergences(student, student, kind=kind, temperature=3.0)
    np.testing.assert_allclose(zero, 0, atol=1e-6)

    def plain(student):
        q, p = log_softmax(student / 1.7), log_softmax(teacher / 1.7)
        m = jnp.log((jnp.exp(p) + jnp.exp(q)) / 2)
        forward, reverse = jnp.exp(p) * (p - q), jnp.exp(q) * (q - p)
        mixed = 0.5 * jnp.exp(p) * (p - m) + 0.5 * jnp.exp(q) * (q - m)
        chosen = {"forward_kl": forward, "reverse_kl": reverse, "jensen_shannon": mixed}[kind]
        return 1.7**2 * chosen.sum()

    def ours(student):
        return divergences(student, teacher, kind=kind, temperature=1.7).sum()

    np.testing.assert_allclose(ours(student), plain(student), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(student), jax.grad(plain)(student), atol=1e-5)
    assert (
        float(jnp.abs(jax.grad(lambda t: divergences(student, t, kind=kind).sum())(teacher)).max())
        == 0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_that_the_teacher_rules_out_is_finite(kind):
    student, teacher = rows(1)
    teacher = teacher.at[0, 3].set(-jnp.inf)
    value, gradient = jax.value_and_grad(lambda s: divergences(s, teacher, kind=kind).sum())(
        student
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_keeps_the_remaining_mass(kind):
    student, teacher = rows()
    num_ids, temperature = 17, 1.5
    whole = divergences(*same_ids(student, teacher, num_ids), kind=kind, temperature=temperature)
    before = np.zeros(len(whole))
    for k in (1, 4, 10, num_ids - 1, num_ids):
        ids, logs = top_log_probs(teacher, num_ids=num_ids, k=k, temperature=temperature)
        assert ids.max() < num_ids and logs.shape[-1] == k + 1
        np.testing.assert_allclose(jnp.exp(logs).sum(-1), 1, atol=1e-6)
        found = top_divergences(
            student, ids, logs, num_ids=num_ids, kind=kind, temperature=temperature
        )
        assert (found <= whole + 1e-5).all() and (found >= before - 1e-5).all()
        before = found
    np.testing.assert_allclose(found, whole, atol=1e-5)

    def of(student):
        return top_divergences(
            student, ids, logs, num_ids=num_ids, kind=kind, temperature=temperature
        ).sum()

    exact = jax.grad(
        lambda s: divergences(
            *same_ids(s, teacher, num_ids), kind=kind, temperature=temperature
        ).sum()
    )(student)
    np.testing.assert_allclose(jax.grad(of)(student), exact, atol=1e-5)
