"""Megablox, the grouped product that JAX ships for TPUs: each row times its group's matrix."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LANES = 128  # the width of a TPU register: rows come in multiples of it
# Rows, inputs and outputs of a tile, at most: larger ones are refused for want of vector memory
# (v5p, products of 4096 by 14336).
_TILES = (512, 512, 1024)


def grouped_dot(
    rows: Float[Array, "T c"],
    matrices: Float[Array, "E o c"],
    sizes: Int[Array, " E"],
    *,
    interpret: bool = False,
) -> Float[Array, "T o"]:
    """The first sizes[0] rows times matrices[0].T, the next sizes[1] times matrices[1].T, …, summed
    in float32. What comes after the last group is not computed and not defined. `interpret` runs
    the kernel without a TPU, slowly."""
    # Imported where it is used: Pallas takes a third of a second, which no CPU run needs.
    from jax.experimental.pallas.ops.tpu.megablox import ops

    count = rows.shape[0]
    tile = next(size for size in (_TILES[0], 256, _LANES) if count % size == 0 or size == _LANES)
    rows = jnp.pad(rows, [(0, -count % tile), (0, 0)])
    _, outputs, inputs = matrices.shape
    tiling = (tile, min(_TILES[1], inputs), min(_TILES[2], outputs))
    out = ops.gmm(
        rows, matrices, sizes, jnp.float32, tiling, transpose_rhs=True, interpret=interpret
    )
    return out[:count]
