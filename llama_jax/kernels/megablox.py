"""Megablox, the grouped product that JAX ships for TPUs: each row times its group's matrix."""

from functools import partial
from typing import Any

import jax
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
    in float32 and rounded once to the dtype of `rows`. What comes after the last group is not
    computed and not defined. `interpret` runs the kernel without a TPU, slowly."""
    count = rows.shape[0]
    rows = jnp.pad(rows, [(0, -count % _LANES), (0, 0)])
    return _product(interpret, rows, matrices, sizes)[:count]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(interpret: bool, rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    _, outputs, inputs = matrices.shape
    tiling = _tiling(rows, inputs, outputs)
    return _kernels().gmm(
        rows, matrices, sizes, rows.dtype, tiling, transpose_rhs=True, interpret=interpret
    )


def _forward(interpret: bool, rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> Any:
    return _product(interpret, rows, matrices, sizes), (rows, matrices, sizes)


def _backward(interpret: bool, operands: Any, gradient: jax.Array) -> Any:
    """The one that JAX ships makes the gradient of the matrices as [E, c, o] and turns it: all
    layers of it are then copied once more where the optimizer reads them. This is [E, o, c]."""
    rows, matrices, sizes = operands
    _, outputs, inputs = matrices.shape
    tiling = _tiling(rows, outputs, inputs)
    turned = gradient.swapaxes(0, 1)
    of_rows = _kernels().gmm(gradient, matrices, sizes, rows.dtype, tiling, interpret=interpret)
    of_matrices = _kernels().tgmm(turned, rows, sizes, matrices.dtype, tiling, interpret=interpret)
    return of_rows, of_matrices, None


_product.defvjp(_forward, _backward)


def _tiling(rows: jax.Array, inputs: int, outputs: int) -> tuple[int, int, int]:
    count = rows.shape[0]
    tile = next(size for size in (_TILES[0], 256, _LANES) if count % size == 0)
    return tile, min(_TILES[1], inputs), min(_TILES[2], outputs)


def _kernels() -> Any:
    # Imported where it is used: Pallas takes a third of a second, which no CPU run needs.
    from jax.experimental.pallas.ops.tpu.megablox.ops import backend

    return backend
