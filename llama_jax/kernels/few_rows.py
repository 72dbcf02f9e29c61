"""The products of attention as plain JAX, for many queries of a key/value head and for few.

Attention is many small products, one for each row and head. How XLA's CPU backend sums one of them
follows from its number of queries; `few_rows_product` sums alike for any.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The score of what a query does not see. Finite, so that a row with nothing to see stays finite;
# added nowhere, only selected, because two such masks added together overflow to -inf and make the
# softmax NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# Up to this many tokens a row, a step's products are bound by reading the cache.
FEW_TOKENS = 8


def many_rows_product(left: Float[Array, "B K m c"], right: Float[Array, "B K c n"]) -> jax.Array:
    return jnp.einsum("bkmc,bkcn->bkmn", left, right, preferred_element_type=jnp.float32)


def few_rows_product(left: Float[Array, "B K m c"], right: Float[Array, "B K c n"]) -> jax.Array:
    """The same for a decoding step's one query per head: bound by reading `right` once.

    XLA's CPU backend runs many tiny products slowly; multiply-and-sum over the second-to-last
    dimension becomes one vectorized pass (2.7 times faster at batch 32).
    """
    wide = left.astype(jnp.float32)[..., None] * right.astype(jnp.float32)[:, :, None]
    return wide.sum(axis=3)
