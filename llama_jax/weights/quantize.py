"""Weight-only quantization: matrices become integers or small floats times scales.

All schemes are symmetric: the largest magnitude of a channel or tile maps to the largest code,
zero to zero. `int8` and `fp8` (e4m3) have one scale per output channel unless a tile is given,
`int4` and `nf4` one per 64 values, which with float32 scales makes 4.5 bits a weight. Everything is
computed in float32 and rounded half to even. Four-bit weights have a budget of 0.6 bytes each:
where short rows or tiles would pass it with float32 scales, scales are bfloat16.

A scheme is a row of `SCHEMES`; a new one is a new row, and a branch in `to_array` if its leaf is
new.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from qwix import QArray

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.select import match_weights, table_rows
from llama_jax.weights.table import Role
from llama_jax.weights.tensors import (
    NF4_VALUES,
    Codebook,
    Leaf,
    PackedTensor,
    is_adapted,
    is_quantized,
    num_tiles,
    pack_nibbles,
)


@dataclass(frozen=True)
class Scheme:
    """largest: the code that the largest magnitude maps to. tile: how many values of a row share a
    scale, None for the whole row. store: float32 codes in [-largest, largest] to stored values.
    codebook: what packed nibbles mean, None for values that are not packed."""

    largest: float
    tile: int | None
    store: Callable[[jax.Array], jax.Array]
    codebook: Codebook | None = None


def _integers(codes: jax.Array) -> jax.Array:
    return jnp.round(codes).astype(jnp.int8)


def _float8(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float8_e4m3fn)


def _nearest_nf4(values: jax.Array) -> jax.Array:
    """The index of the nearest of the sixteen values: how many midpoints lie below."""
    index = jnp.zeros(values.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4_VALUES):
        index += (values > (low + high) / 2).astype(jnp.uint8)
    return index


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(127.0, None, _integers),
    "int4": Scheme(7.0, 64, _integers, "int4"),
    "nf4": Scheme(1.0, 64, _nearest_nf4, "nf4"),
    "fp8": Scheme(float(jnp.finfo(jnp.float8_e4m3fn).max), None, _float8),
}

# Bytes of a four-bit weight, its share of the scale included.
_BUDGET_BYTES = 0.6

# Roles that can be quantized at all, and those among them that lose most by it: a row of the
# embedding is used as it is, errors of the head are errors of logits, and those of the router
# change which experts are asked.
_QUANTIZABLE: tuple[Role, ...] = ("matrix", "router", "embedding", "head")
_SKIPPED: tuple[Role, ...] = ("router", "embedding", "head")


def quantize(
    config: ModelConfig,
    params: tree.Tree,
    *,
    scheme: str,
    tile: int | None = None,
    skip: Sequence[str] | None = None,
    donate: bool = False,
) -> tree.Tree:
    """The parameters with quantized matrices, made one weight (and one layer) at a time.

    tile: how many neighbouring values of a row share a scale; None takes the scheme's own.
    skip: patterns, as in `select`, of weights to leave alone; None leaves embedding, head and
    router, an empty list nothing. Norms and biases are never quantized. donate: delete each
    original as soon as it is replaced, so that both never exist together; `params` is of no use
    afterwards.

    Raises ValueError for an unknown scheme, for weights that are quantized or adapted already, for
    a tile that does not divide a row (8-bit schemes), and for weights that are not finite.
    """
    _scheme(scheme)
    rows = table_rows(config, params)
    if skip is None:
        skipped = {path for path, row in rows.items() if row.role in _SKIPPED}
    else:
        skipped = match_weights(rows, skip) if skip else set()

    def chosen(path: str) -> bool:
        return rows[path].role in _QUANTIZABLE and path not in skipped

    for path, leaf in tree.flatten(params).items():
        if chosen(path):
            _check_leaf(path, leaf, scheme, tile)

    def replace(path: str, leaf: Leaf) -> Leaf:
        if not chosen(path):
            return leaf
        quantized, finite = _quantize(leaf, scheme, tile)
        # Under `jax.eval_shape` there are shapes and no values to look at.
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise ValueError(f"{path} holds values that are not finite and cannot be quantized")
        if donate:
            leaf.delete()
        return quantized

    return tree.map_with_path(replace, params)


def quantize_array(weight: jax.Array, *, scheme: str, tile: int | None = None) -> Leaf:
    """One weight [..., out, in] as a quantized leaf; the same rules as `quantize`."""
    _scheme(scheme)
    _check_leaf("the weight", weight, scheme, tile)
    quantized, finite = _quantize(weight, scheme, tile)
    if not finite:
        raise ValueError("the weight holds values that are not finite and cannot be quantized")
    return quantized


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise ValueError(f"scheme is {name!r}; allowed are {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _check_leaf(path: str, leaf: Leaf, scheme: str, tile: int | None) -> None:
    if is_quantized(leaf):
        raise ValueError(f"{path} is quantized already; start from the unquantized model")
    if is_adapted(leaf):
        raise ValueError(
            f"{path} has an adapter; quantize the base before adding adapters, or merge them first"
        )
    if tile is None:
        return
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ValueError(f"tile is {tile!r}; it must be a positive integer")
    size = leaf.shape[-1]
    if SCHEMES[scheme].codebook is not None:
        return  # the last tile of a row may be short
    if size % tile:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        below = max(n for n in divisors if n < tile)
        above = [str(n) for n in divisors if n > tile][:1]
        raise ValueError(
            f"tile {tile} does not divide the {size} inputs of {path}; nearest that do: "
            f"{' and '.join([str(below), *above])}"
        )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(weight: jax.Array, scheme: str, tile: int | None) -> tuple[Leaf, jax.Array]:
    """The leaf and whether all values were finite. Stacked layers are done one after the other,
    so that float32 copies never exist of more than one."""
    convert = functools.partial(_quantize_matrix, scheme=SCHEMES[scheme], tile=tile)
    if weight.ndim == 2:
        return convert(weight)
    leaf, finite = jax.lax.map(convert, weight)
    return leaf, finite.all()


def _quantize_matrix(
    weight: jax.Array, *, scheme: Scheme, tile: int | None
) -> tuple[Leaf, jax.Array]:
    """[..., out, in] at once."""
    wide = weight.astype(jnp.float32)
    size = wide.shape[-1]
    tile = min(tile or scheme.tile or size, size)
    tiles = num_tiles(size, tile)
    padding = [(0, 0)] * (wide.ndim - 1) + [(0, tiles * tile - size)]
    tiled = jnp.pad(wide, padding).reshape(*wide.shape[:-1], tiles, tile)
    peak = jnp.max(jnp.abs(tiled), axis=-1, keepdims=True)
    stored, scale = encode(tiled, peak, scheme=scheme, scale_dtype=_scale_dtype(size, tile, scheme))
    stored = stored.reshape(*wide.shape[:-1], tiles * tile)[..., :size]
    finite = jnp.isfinite(wide).all()
    if scheme.codebook is None:
        return QArray(stored, scale[..., 0]), finite
    packed = PackedTensor(pack_nibbles(stored), scale[..., 0], scheme.codebook, size, tile)
    return packed, finite


def _scale_dtype(size: int, tile: int, scheme: Scheme) -> Any:
    """The widest dtype that keeps four-bit rows of `size` values in the budget, if there is one."""
    if scheme.codebook is not None:
        for dtype in (jnp.float32, jnp.bfloat16):
            row_bytes = (size + 1) // 2 + num_tiles(size, tile) * jnp.dtype(dtype).itemsize
            if row_bytes <= _BUDGET_BYTES * size:
                return dtype
    return jnp.float32


def encode(
    values: jax.Array, peak: jax.Array, *, scheme: Scheme, scale_dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """(stored values, scales) for float32 values of which `peak` maps to the largest code.

    Values beyond the peak are clamped to it. A peak of zero, or so small that its scale would
    underflow, gets scale one and all codes zero.
    """
    empty = peak < jnp.finfo(jnp.float32).tiny * scheme.largest
    scale = jnp.where(empty, 1.0, peak / scheme.largest).astype(scale_dtype)
    # (w * largest) / peak rather than w / scale: exact halves stay halves. A rounded scale is
    # what the codes will be multiplied by, so they are made for it.
    rounded = scale.astype(jnp.float32) * scheme.largest
    divisor = peak if scale_dtype == jnp.float32 else rounded
    codes = values * scheme.largest / jnp.where(empty, 1.0, divisor)
    codes = jnp.clip(jnp.where(empty, 0.0, codes), -scheme.largest, scheme.largest)
    return scheme.store(codes), scale
