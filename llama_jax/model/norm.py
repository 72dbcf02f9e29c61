"""The sum within a norm, whose bits do not depend on how many rows there are."""

import jax
import jax.numpy as jnp

# Numbers from which XLA's CPU backend sums rows in one order; those of smaller arrays in another.
_SUMMED_ALIKE = 4096


def mean_square(x: jax.Array) -> jax.Array:
    """[..., D] -> [..., 1], of few rows with the bits that it has among many.

    In an exported program the number of rows is open.
    """
    if isinstance(x.size, int) and x.size < _SUMMED_ALIKE:
        rows = x.reshape(-1, x.shape[-1])
        more = -(-_SUMMED_ALIKE // x.shape[-1]) - len(rows)
        filled = jnp.pad(rows, ((0, more), (0, 0)))
        return mean_square(filled)[: len(rows)].reshape(*x.shape[:-1], 1)
    return jnp.mean(x * x, axis=-1, keepdims=True)
