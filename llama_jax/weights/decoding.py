"""Products with matrices made for decoding: few rows of activations at a time, on a CPU.

A plain matrix comes first in its product, which is faster. A quantized one is made plain piece by
piece, each while it is in the core's cache: the whole would be written to memory and read again,
in one place for each matrix of the model, which takes more memory and time than no quantization.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from qwix import QArray

from llama_jax.config import Compute
from llama_jax.weights.float8 import as_float8
from llama_jax.weights.integers import in_tiles, integer_sums, rescaled, rounded
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import Float8Tensor, IntegerTensor, PackedTensor, is_quantized
from llama_jax.weights.tensors import DecodingTensor, to_array

_FEW_ROWS = 48
# Numbers of rows that are compared with two. XLA's CPU backend takes rows by eights and sixteens,
# and those of 33 may sum like two where those of 32 do not.
_TRIED_ROWS = (2, 4, 8, 16, 24, 32, 33, 40, _FEW_ROWS)
_TRIED_OUTPUTS = 64
_PIECE = 2**18  # numbers of a matrix, a mebibyte in float32


def decoding_product(x: jax.Array, weight: DecodingTensor, compute: Compute) -> jax.Array:
    """x [T, in] times weight [out, in] -> [T, out] in the accumulation dtype."""
    leaf = weight.array
    if not is_quantized(leaf):
        return _rows(x, leaf.astype(x.dtype), weight, compute)
    if isinstance(leaf, Float8Tensor):
        inputs = as_float8(x, leaf.activation_scale).astype(x.dtype)
        return _dequantized_product(inputs, leaf.base, weight, compute)
    if not isinstance(leaf, IntegerTensor):
        return _dequantized_product(x, leaf, weight, compute)
    wide = x.astype(jnp.float32)
    if leaf.is_tiled:
        # As the floats that the integers stand for: on a CPU faster than sums of short tiles.
        values, own = rounded(in_tiles(wide, leaf))
        inputs = (values.astype(jnp.float32) * own).reshape(len(x), -1)[:, : x.shape[-1]]
        return _dequantized_product(inputs, leaf.base, weight, compute)
    values, own = rounded(wide, leaf.activation_scale)
    total = rescaled(_integer_total(values, leaf.base), own, leaf.base)
    return total.astype(compute.accumulation_dtype)


def _dequantized_product(
    x: jax.Array, leaf: Leaf, weight: DecodingTensor, compute: Compute
) -> jax.Array:
    def part(piece: Leaf) -> jax.Array:
        if not isinstance(piece, PackedTensor):
            return _rows(x, to_array(piece, dtype=x.dtype), weight, compute)
        # Two products, so that neighbouring nibbles need not be brought next to each other.
        even, odd = (half.astype(x.dtype) for half in piece.halves())
        evens = _rows(x[:, 0::2], even, weight, compute)
        return evens + _rows(x[:, 1::2], odd, weight, compute)

    return _in_pieces(leaf, len(x), part, compute.accumulation_dtype)


def _integer_total(values: jax.Array, base: QArray | PackedTensor) -> jax.Array:
    """int8 [T, in] times the codes of base [out, in] -> int32 [T, out]."""
    if isinstance(base, QArray):
        return integer_sums(values, base.qvalue)

    def part(piece: PackedTensor) -> jax.Array:
        even, odd = piece.half_codes()
        return integer_sums(values[:, 0::2], even) + integer_sums(values[:, 1::2], odd)

    return _in_pieces(base, len(values), part, "int32")


def _in_pieces(leaf: Leaf, rows: int, part: Callable[[Leaf], jax.Array], dtype: str) -> jax.Array:
    """[rows, out] of what `part` makes [rows, n] of n outputs of a leaf."""
    out, inner = leaf.shape
    height = -(-out // -(-out * inner // _PIECE))
    if height == out:
        return part(leaf)
    takers = jax.tree.map(_taker, leaf)

    def add(i: jax.Array, result: jax.Array) -> jax.Array:
        begin = jnp.minimum(i * height, out - height)  # the last takes some outputs once more
        piece = jax.tree.map(lambda take: take(begin, height), takers)
        return jax.lax.dynamic_update_slice_in_dim(result, part(piece), begin, axis=1)

    return jax.lax.fori_loop(0, -(-out // height), add, jnp.zeros((rows, out), dtype))


def _taker(array: jax.Array) -> Callable[[jax.Array, int], jax.Array]:
    """What takes so many rows from a begin on."""
    if array.dtype.itemsize > 1 or not jnp.issubdtype(array.dtype, jnp.floating):
        return lambda begin, height: jax.lax.dynamic_slice_in_dim(array, begin, height)

    def take(begin: jax.Array, height: int) -> jax.Array:
        # XLA's CPU backend widens floats of eight bits to move them, but not bytes. The barrier
        # keeps it from making bytes of the whole matrix before the loop, in each step anew.
        floats, begin = jax.lax.optimization_barrier((array, begin))
        held = jax.lax.bitcast_convert_type(floats, jnp.uint8)
        piece = jax.lax.dynamic_slice_in_dim(held, begin, height)
        return jax.lax.bitcast_convert_type(piece, array.dtype)

    return take


def _rows(x: jax.Array, array: jax.Array, weight: DecodingTensor, compute: Compute) -> jax.Array:
    """The weight first is faster for a few rows: XLA's CPU backend copies one operand into tiles.
    But how it sums then follows from the number of rows; with the weight last it follows from the
    matrix alone, for two rows or more."""
    rows, width = x.shape
    if rows < 2 or max(rows, weight.alike_rows) > _FEW_ROWS:
        return plain_product(x, array, compute)
    if not weight.alike_rows:
        return _weight_first(x, array, compute)
    alike = _summing_like_two(width, x.dtype.name, compute)
    if max(rows, weight.alike_rows) > alike[-1]:
        return plain_product(x, array, compute)
    padding = next(number for number in alike if number >= rows) - rows
    return _weight_first(jnp.pad(x, ((0, padding), (0, 0))), array, compute)[:rows]


@functools.cache
def _summing_like_two(width: int, dtype: str, compute: Compute) -> tuple[int, ...]:
    """Of `_TRIED_ROWS`, those whose products with the weight first give a row the bits that it has
    among two. It follows from XLA, the CPU and the number of inputs, so products are looked at:
    once in a process, while the first step that asks is traced."""
    draw = np.random.default_rng(0).standard_normal
    matrix = draw((_TRIED_OUTPUTS, width)).astype(dtype)
    rows = draw((_FEW_ROWS, width)).astype(dtype)

    def try_all(rows: jax.Array, matrix: jax.Array) -> list[jax.Array]:
        return [_weight_first(rows[:number], matrix, compute)[:2] for number in _TRIED_ROWS]

    with jax.ensure_compile_time_eval():
        two, *more = jax.device_get(jax.jit(try_all)(rows, matrix))
    same = [product.tobytes() == two.tobytes() for product in (two, *more)]
    return tuple(itertools.compress(_TRIED_ROWS, same))


def _weight_first(x: jax.Array, array: jax.Array, compute: Compute) -> jax.Array:
    # The barrier keeps XLA from turning the product back.
    return jax.lax.optimization_barrier(plain_product(array, x, compute)).T


def plain_product(
    x: jax.Array, weight: jax.Array, compute: Compute, *, contracted: int = 1
) -> jax.Array:
    """x [T, in] times weight [out, in], or [in, out] with `contracted` 0, in the accumulation
    dtype."""
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (contracted,)), ((), ())),
        preferred_element_type=jnp.dtype(compute.accumulation_dtype),
    )
