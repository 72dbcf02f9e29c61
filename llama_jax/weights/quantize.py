"""Weight-only quantization: matrices become integers or small floats times scales.

All schemes are symmetric: the largest magnitude of a channel or tile maps to the largest code,
zero to zero. `int8` and `fp8` (e4m3) have one scale per output channel unless a tile is given,
`int4` and `nf4` one per 64 values, which with float32 scales makes 4.5 bits a weight. Everything is
computed in float32 and rounded half to even. Four-bit weights have a budget of 0.6 bytes each:
where short rows or tiles would pass it with float32 scales, scales are bfloat16. With double
quantization scales of long rows take eight bits, which makes 4.14 bits a weight.

A scheme is a row of `SCHEMES`; a new one is a new row, and a branch in `to_array` if its leaf is
new. With `-dynamic` or `-static` behind them, activations are rounded as well: with a scale for
each token at run time, or with one for each weight from `calibrate`. Those of `int8` and `int4` are
rounded to int8, and products are those of integers. Weights then have one float32 scale for each
output, or, with a tile, both have one for each tile of a row, and sums are made tile by tile. Those
of `fp8` are rounded to float8, and multiplied as the numbers they then stand for.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from qwix import QArray

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.adapted import LoraTensor, is_adapted
from llama_jax.weights.float8 import LARGEST
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import (
    NF4_VALUES,
    Codebook,
    Float8Tensor,
    IntegerTensor,
    PackedScale,
    PackedTensor,
    RoundedInputs,
    is_quantized,
    num_tiles,
    pack_nibbles,
)
from llama_jax.weights.select import match_weights, table_rows
from llama_jax.weights.table import Role
from llama_jax.weights.tensors import QatTensor


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
    "fp8": Scheme(LARGEST, None, _float8),
}

# Schemes that round activations too, with where their scales are from; the first are those whose
# products are of integers.
_ACTIVATIONS = ("dynamic", "static")
INTEGER_SCHEMES = tuple(f"{name}-{how}" for name in ("int8", "int4") for how in _ACTIVATIONS)
ROUNDING_SCHEMES = (*INTEGER_SCHEMES, *(f"fp8-{how}" for how in _ACTIVATIONS))

# Bytes of a four-bit weight, its share of the scale included.
_BUDGET_BYTES = 0.6

# Of how many neighbouring scales the range is divided into 256 steps (QLoRA, section 3), and from
# how many scales of a row on that saves anything: the range itself is two numbers in float32.
_SCALE_BLOCK = 256
_LEAST_SCALES = 4

# Roles that can be quantized at all, and those among them that lose most by it: a row of the
# embedding is used as it is, errors of the head are errors of logits, and those of the router
# change which experts are asked.
_QUANTIZABLE: tuple[Role, ...] = ("matrix", "router", "embedding", "head")
_SKIPPED: tuple[Role, ...] = ("router", "embedding", "head")


@dataclass(frozen=True)
class Quantization:
    """How weights are to be stored.

    tile: how many neighbouring values of a row share a scale; None takes the scheme's own.
    skip: patterns, as in `select`, of weights to leave alone; None leaves embedding, head and
    router, an empty tuple nothing. Norms and biases are never quantized. double: scales of
    four-bit weights take eight bits each where a row has at least four of them. peaks: of static
    schemes, the largest magnitude of the inputs of each weight by its path, a number for each of
    its matrices.
    """

    scheme: str
    tile: int | None = None
    skip: tuple[str, ...] | None = None
    double: bool = False
    peaks: Mapping[str, jax.Array] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.scheme not in (*SCHEMES, *ROUNDING_SCHEMES):
            raise ValueError(
                f"scheme is {self.scheme!r}; allowed are {', '.join((*SCHEMES, *ROUNDING_SCHEMES))}"
            )
        if self.activations is not None and self.double:
            raise ValueError(
                f"scheme {self.scheme} has few scales, which sums are multiplied with; leave "
                f"double quantization out"
            )
        if self.activations == "static" and self.tile is not None:
            raise ValueError(
                f"scheme {self.scheme} has one scale for all inputs of a weight; leave tile out, "
                f"or choose {self.scheme.replace('static', 'dynamic')}"
            )
        if (self.activations == "static") != (self.peaks is not None):
            raise ValueError(
                f"scheme {self.scheme} with{'out' if self.peaks is None else ''} the ranges of "
                f"activations; the -static schemes need them, from `calibrate`, and no other "
                f"scheme reads them"
            )
        tile = self.tile
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise ValueError(f"tile is {tile!r}; it must be a positive integer")
        if self.double and self.weights.codebook is None:
            packed = [name for name, scheme in SCHEMES.items() if scheme.codebook is not None]
            raise ValueError(
                f"double quantization is of the scales of {' and '.join(packed)}; scheme "
                f"{self.scheme} has too few for it to save anything"
            )

    @property
    def activations(self) -> str | None:
        """`dynamic` or `static` where activations are rounded too."""
        return self.scheme.partition("-")[2] or None

    @property
    def weights(self) -> Scheme:
        return SCHEMES[self.scheme.partition("-")[0]]

    def chosen(self, config: ModelConfig, params: tree.Tree) -> set[str]:
        """The paths of the weights to quantize, each checked to be one that can be.

        Raises ValueError for weights that are quantized or adapted already, for a tile that does
        not divide a row (8-bit schemes), for a pattern without a match, and for double
        quantization that no row is long enough for.
        """
        rows = table_rows(config, params)
        if self.skip is None:
            skipped = {path for path, row in rows.items() if row.role in _SKIPPED}
        else:
            skipped = match_weights(rows, self.skip) if self.skip else set()
        paths = {path for path, row in rows.items() if row.role in _QUANTIZABLE} - skipped
        if not paths:
            raise ValueError(
                f"skip {', '.join(self.skip or ())} leaves nothing to quantize; skip less, or do "
                f"not quantize"
            )
        for path, leaf in tree.flatten(params).items():
            if path in paths:
                _check_leaf(path, leaf, self)
        if self.double:
            self._check_double({path: rows[path].shape[-1] for path in paths})
        experts = sorted(path for path in paths if ".experts." in path)
        if self.activations is not None and experts:
            raise ValueError(
                f"scheme {self.scheme} would round the inputs of {experts[0]}, but experts are "
                f"multiplied in groups of tokens, which takes full numbers; skip them (experts, "
                f"role:embedding, role:head, role:router), or choose "
                f"{self.scheme.partition('-')[0]}"
            )
        if self.peaks is not None and (lacking := sorted(paths - set(self.peaks))):
            raise ValueError(
                f"the calibration says nothing about {', '.join(lacking[:3])}; calibrate the same "
                f"weights that are quantized"
            )
        return paths

    def _check_double(self, sizes: Mapping[str, int]) -> None:
        path = max(sizes, key=lambda path: sizes[path])
        tile = self.tile or self.weights.tile or sizes[path]
        if num_tiles(sizes[path], tile) < _LEAST_SCALES:
            raise ValueError(
                f"double quantization is of rows with at least {_LEAST_SCALES} scales, but with "
                f"tile {tile} no weight has so many: the longest row is that of {path}, "
                f"{sizes[path]} values; leave it out, or choose a smaller tile"
            )

    def apply(self, path: str, weight: jax.Array) -> Leaf:
        """A weight [..., out, in] as a quantized leaf; `path` names it where it is not finite."""
        quantized, finite = _quantize(weight, self)
        if self.activations is not None:
            peak = None if self.peaks is None else self.peaks[path]
            kind = IntegerTensor if self.scheme in INTEGER_SCHEMES else Float8Tensor
            scale = None if peak is None else input_scale(peak, largest=kind.largest_input)
            quantized = kind(quantized, scale)
        # Under `jax.eval_shape` there are shapes and no values to look at.
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise ValueError(f"{path} holds values that are not finite and cannot be quantized")
        return quantized


def quantize(
    config: ModelConfig,
    params: tree.Tree,
    *,
    scheme: str,
    tile: int | None = None,
    skip: Sequence[str] | None = None,
    double: bool = False,
    peaks: Mapping[str, jax.Array] | None = None,
    donate: bool = False,
) -> tree.Tree:
    """The parameters with quantized matrices, made one weight (and one layer) at a time; see
    `Quantization` for what the options mean.

    donate: delete each original as soon as it is replaced, so that both never exist together;
    `params` is of no use afterwards.

    Raises ValueError as `Quantization` and its `chosen` do, and for weights that are not finite.
    """
    how = Quantization(scheme, tile, None if skip is None else tuple(skip), double, peaks)
    chosen = how.chosen(config, params)

    def replace(path: str, leaf: Leaf) -> Leaf:
        if path not in chosen:
            return leaf
        quantized = how.apply(path, leaf)
        if donate:
            leaf.delete()
        return quantized

    return tree.map_with_path(replace, params)


def stored_types(params: tree.Tree) -> str | None:
    """What quantized weights are stored in, such as int8, nf4 or int8-dynamic, also under adapters;
    None where there are none."""
    kinds: set[str] = set()
    for leaf in tree.flatten(params).values():
        base = leaf.base if isinstance(leaf, LoraTensor) else leaf
        how = ""
        if isinstance(base, RoundedInputs):
            how = "-dynamic" if base.activation_scale is None else "-static"
            base = base.base
        if isinstance(base, PackedTensor):
            kinds.add(base.codebook + how)
        elif isinstance(base, QArray):
            kinds.add(f"{jnp.dtype(base.qtype)}{how}")
    return ", ".join(sorted(kinds)) or None


def input_scale(peak: jax.Array, *, largest: float) -> jax.Array:
    """What the largest magnitude of inputs is divided by to become `largest`; of inputs that are
    zero throughout, one."""
    return jnp.where(peak > 0, peak / largest, 1.0).astype(jnp.float32)


def _check_leaf(path: str, leaf: Leaf, how: Quantization) -> None:
    if is_quantized(leaf):
        raise ValueError(
            f"{path} is quantized already; start from the unquantized model, or train adapters on "
            f"this one as it is, with method lora"
        )
    if isinstance(leaf, QatTensor):
        raise ValueError(
            f"{path} was trained to be int{leaf.bits}; choose scheme qat, which makes the integers "
            f"it was trained with"
        )
    if is_adapted(leaf):
        raise ValueError(
            f"{path} has an adapter; quantize the base before adding adapters, or merge them first"
        )
    size, tile = leaf.shape[-1], how.tile
    # The last tile of a row of four-bit values may be short.
    if tile is not None and how.weights.codebook is None and size % tile:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        below = max(n for n in divisors if n < tile)
        above = [str(n) for n in divisors if n > tile][:1]
        raise ValueError(
            f"tile {tile} does not divide the {size} inputs of {path}; nearest that do: "
            f"{' and '.join([str(below), *above])}"
        )


@functools.partial(jax.jit, static_argnums=1)
def _quantize(weight: jax.Array, how: Quantization) -> tuple[Leaf, jax.Array]:
    """The leaf and whether all values were finite. Stacked layers are done one after the other,
    so that float32 copies never exist of more than one."""
    convert = functools.partial(_quantize_matrix, how=how)
    if weight.ndim == 2:
        return convert(weight)
    leaf, finite = jax.lax.map(convert, weight)
    return leaf, finite.all()


def _quantize_matrix(weight: jax.Array, *, how: Quantization) -> tuple[Leaf, jax.Array]:
    """[..., out, in] at once."""
    scheme = how.weights
    wide = weight.astype(jnp.float32)
    size = wide.shape[-1]
    tile = min(how.tile or (None if how.activations else scheme.tile) or size, size)
    tiles = num_tiles(size, tile)
    padding = [(0, 0)] * (wide.ndim - 1) + [(0, tiles * tile - size)]
    tiled = jnp.pad(wide, padding).reshape(*wide.shape[:-1], tiles, tile)
    peak = jnp.max(jnp.abs(tiled), axis=-1, keepdims=True)
    scale: Any
    if how.double and tiles >= _LEAST_SCALES:
        scale = pack_scales(peak[..., 0] / scheme.largest)
        held = scale.astype(jnp.float32)[..., None] * scheme.largest
        stored = scheme.store(_codes(tiled, held, _is_empty(peak, scheme), scheme))
    else:
        dtype = jnp.float32 if how.activations else _scale_dtype(size, tile, scheme)
        stored, scale = encode(tiled, peak, scheme=scheme, scale_dtype=dtype)
        scale = scale[..., 0]
    stored = stored.reshape(*wide.shape[:-1], tiles * tile)[..., :size]
    finite = jnp.isfinite(wide).all()
    if scheme.codebook is None:
        return QArray(stored, scale), finite
    return PackedTensor(pack_nibbles(stored), scale, scheme.codebook, size, tile), finite


def pack_scales(scale: jax.Array) -> PackedScale:
    """Scales [..., out, tiles] of at least zero in eight bits, rounded up: no value of a tile then
    lies beyond its largest code. What is left out of a block's range is zeros, whose tiles are
    empty and may have any scale."""
    tiles = scale.shape[-1]
    block = min(_SCALE_BLOCK, tiles)
    blocks = num_tiles(tiles, block)
    padding = [(0, 0)] * (scale.ndim - 1) + [(0, blocks * block - tiles)]
    parts = jnp.pad(scale, padding).reshape(*scale.shape[:-1], blocks, block)
    tiny = jnp.finfo(jnp.float32).tiny
    high = parts.max(axis=-1)
    high = jnp.where(high < tiny, 1.0, high)
    low = jnp.where(parts < tiny, high[..., None], parts).min(axis=-1)
    step = (high - low) / 255
    codes = jnp.ceil((parts - low[..., None]) / jnp.where(step > 0, step, 1.0)[..., None])
    codes = jnp.clip(codes, 0, 255).astype(jnp.uint8)
    return PackedScale(codes.reshape(*scale.shape[:-1], -1)[..., :tiles], low, step, block)


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
    empty = _is_empty(peak, scheme)
    scale = jnp.where(empty, 1.0, peak / scheme.largest).astype(scale_dtype)
    # A rounded scale is what the codes will be multiplied by, so they are made for it.
    rounded = scale.astype(jnp.float32) * scheme.largest
    divisor = peak if scale_dtype == jnp.float32 else rounded
    return scheme.store(_codes(values, divisor, empty, scheme)), scale


def to_codes(values: jax.Array, scale: jax.Array, scheme: Scheme) -> jax.Array:
    """Stored values for float32 values with scales that are there already."""
    return scheme.store(_codes(values, scale * scheme.largest, scale <= 0, scheme))


def _is_empty(peak: jax.Array, scheme: Scheme) -> jax.Array:
    return peak < jnp.finfo(jnp.float32).tiny * scheme.largest


def _codes(values: jax.Array, peak: jax.Array, empty: jax.Array, scheme: Scheme) -> jax.Array:
    """(w * largest) / peak rather than w / scale: exact halves stay halves."""
    codes = values * scheme.largest / jnp.where(empty, 1.0, peak)
    return jnp.clip(jnp.where(empty, 0.0, codes), -scheme.largest, scheme.largest)
