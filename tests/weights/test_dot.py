"""Products of matrices that are made for few rows."""

from functools import partial

import jax
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.weights.dot import dot
from llama_jax.weights.tensors import DecodingTensor


@pytest.mark.parametrize("size", [(96, 64), (64, 200)])
def test_rows_of_a_decoding_matrix_have_the_same_bits_beside_any_others(size):
    weight = DecodingTensor(jax.random.normal(jax.random.key(0), size), sums_alike=True)
    rows = jax.random.normal(jax.random.key(1), (48, size[1]))
    product = jax.jit(partial(dot, compute=Compute()))
    wanted = np.asarray(product(rows, weight))
    np.testing.assert_allclose(wanted, rows @ weight.array.T, atol=2e-4)
    for count in (2, 7, 8, 9, 16, 17, 24, 25, 32, 33, 40, 41):
        np.testing.assert_array_equal(product(rows[:count], weight), wanted[:count], str(count))
