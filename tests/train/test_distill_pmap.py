"""The step of distillation under `jax.pmap` is the sharded one, to 1e-6: compiled as users do it,
because how sums are vectorized is more than that."""

import jax
import numpy as np
import pytest

from tests.train.test_distill import Case
from train.distill_pmap import AXIS


@pytest.fixture(scope="module")
def alone():
    return Case().run({"data": 1})


def test_the_pmap_step_is_the_sharded_step(alone):
    """To 1e-6, on eight devices, over several AdamW steps."""
    sharded, numbers = Case().run({"data": 8})
    mapped, found = Case(axis=AXIS).run({"data": 8}, pmap=True)
    for one, other in zip(found, numbers, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    assert int(mapped.step) == 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mapped.params, sharded.params
    )
    for one, other in zip(numbers, alone[1], strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=2e-5)


def test_pmap_takes_micro_batches_too(alone):
    _, found = Case(axis=AXIS, accumulation_steps=2).run({"data": 2}, pmap=True, steps=1)
    assert found[0] == pytest.approx(alone[1][0], rel=5e-5, abs=5e-5)
