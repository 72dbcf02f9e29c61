"""Quantized leaves: matrices in eight or four bits, with their scales.

Eight-bit tensors are Qwix's `QArray` (int8 and fp8 values, scales per channel or tile), four-bit
ones are `PackedTensor`: a CPU stores an int4 array in one byte a value. Their scales may be packed
too, in eight bits (`PackedScale`). Where inputs are rounded as well (`RoundedInputs`), integers lie
in an `IntegerTensor` and fp8 values in a `Float8Tensor`. What makes them is in `quantize.py`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from qwix import QArray

from llama_jax.weights.float8 import LARGEST
from llama_jax.weights.leaf import Array, Leaf, OfBase

Codebook = Literal["int4", "nf4"]

# The sixteen values of NormalFloat 4: quantiles of a normal distribution scaled to [-1, 1], with
# an exact zero (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedScale:
    """Positive scales in eight bits each: double quantization (QLoRA, section 3).

    codes: uint8 [..., out, tiles]; low, step: float32 [..., out, blocks], one for each `block`
    neighbouring scales of a row, the last for what remains. A scale is low + code * step.
    """

    codes: Array
    low: Array
    step: Array
    block: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def dtype(self) -> Any:
        """Of the scales it stands for."""
        return self.low.dtype

    def astype(self, dtype: Any) -> jax.Array:
        """The scales, [..., out, tiles]."""
        low, step = (
            jnp.repeat(part, self.block, axis=-1)[..., : self.codes.shape[-1]]
            for part in (self.low, self.step)
        )
        return (low + self.codes.astype(jnp.float32) * step).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedTensor:
    """A matrix of four-bit values, two in a byte, times scales.

    packed: uint8 [..., out, ceil(in / 2)], see `pack_nibbles`; scale: [..., out, tiles], each for
    `tile` neighbouring values of a row, the last for what remains, an array or a `PackedScale`.
    `codebook` says what a nibble means: `int4` a two's complement integer, `nf4` an index into
    `NF4_VALUES`. `size` is `in`.
    """

    packed: Array
    scale: Array | PackedScale
    codebook: Codebook = field(metadata={"static": True})
    size: int = field(metadata={"static": True})
    tile: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.size)

    @property
    def ndim(self) -> int:
        return len(self.packed.shape)

    @property
    def dtype(self) -> Any:
        """Of the values it stands for."""
        return self.scale.dtype

    def half_codes(self) -> tuple[jax.Array, jax.Array]:
        """What the nibbles of even and of odd columns mean, without the scales: int8 integers
        [..., out, ceil(in / 2)] and [..., out, in // 2] of int4, values in float32 of nf4."""
        if self.codebook == "int4":
            low, high = _signed_halves(self.packed)
        else:
            low, high = _nf4_values(self.packed & 0xF), _nf4_values(self.packed >> 4)
        return low, high[..., : self.size // 2]

    def halves(self) -> tuple[jax.Array, jax.Array]:
        """The even and the odd columns of the matrix in float32. Nothing is moved to another place
        for them, which on a CPU takes several times as long as everything else."""
        scale = self.scale.astype(jnp.float32)
        if self.tile % 2 and scale.shape[-1] > 1:
            whole = jnp.repeat(scale, self.tile, axis=-1)[..., : self.size]
            scales = whole[..., 0::2], whole[..., 1::2]
        else:
            half = jnp.repeat(scale, -(-self.tile // 2), axis=-1)
            scales = half[..., : -(-self.size // 2)], half[..., : self.size // 2]
        even, odd = (
            codes.astype(jnp.float32) * scale
            for codes, scale in zip(self.half_codes(), scales, strict=True)
        )
        return even, odd

    def dequantize(self) -> jax.Array:
        """The matrix in float32, [..., out, in]."""
        codes = unpack_nibbles(self.packed, self.size)
        if self.codebook == "int4":
            values = signed_nibbles(codes).astype(jnp.float32)
        else:
            values = _nf4_values(codes)
        scale = jnp.repeat(self.scale.astype(jnp.float32), self.tile, axis=-1)
        return values * scale[..., : self.size]


@dataclass(frozen=True)
class RoundedInputs(OfBase):
    """A quantized matrix whose inputs are rounded as well, before they are multiplied: with a scale
    of their own for each token where activation_scale is None, else with that, [...], one number
    for each matrix of the stack."""

    base: QArray | PackedTensor
    activation_scale: Array | None

    # What the largest magnitude of a token becomes.
    largest_input: ClassVar[float]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IntegerTensor(RoundedInputs):
    """A matrix of int8 or int4 values that inputs are multiplied with as integers.

    base: int8 values in a QArray or int4 ones in a PackedTensor, a float32 scale for each output
    or for each tile of a row; inputs, rounded to int8, then have one for each tile of a token.
    """

    largest_input = 127.0

    @property
    def is_tiled(self) -> bool:
        return self.base.scale.shape[-1] > 1

    @property
    def tile(self) -> int:
        """How many inputs share a scale."""
        if isinstance(self.base, PackedTensor):
            return self.base.tile
        return self.base.shape[-1] // self.base.scale.shape[-1]

    def codes(self) -> jax.Array:
        """The integers, int8 [..., out, in]."""
        if isinstance(self.base, PackedTensor):
            return signed_nibbles(unpack_nibbles(self.base.packed, self.base.size))
        return self.base.qvalue


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float8Tensor(RoundedInputs):
    """A matrix of float8 values whose inputs are rounded to float8. base: a QArray of any tile."""

    largest_input = LARGEST


def is_quantized(leaf: Leaf) -> bool:
    return isinstance(leaf, QArray | PackedTensor | RoundedInputs)


def num_tiles(size: int, tile: int) -> int:
    return math.ceil(size / tile)


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Integers [..., n] -> uint8 [..., ceil(n / 2)]: the four low bits of each, the first of a
    pair in the low half of the byte. An odd row ends with a zero nibble."""
    codes = codes.astype(jnp.uint8) & 0xF
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: jax.Array, size: int) -> jax.Array:
    """uint8 [..., ceil(size / 2)] -> the `size` nibbles of each row as uint8."""
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)[..., :size]


def _nf4_values(codes: jax.Array) -> jax.Array:
    """The values that nibbles mean, chosen bit by bit: unlike a look-up in a table, comparisons
    are fused with what follows, and no array of indices is ever in memory."""
    values: list[Any] = [jnp.float32(value) for value in NF4_VALUES]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[0::2], values[1::2], strict=True)
        ]
    return values[0]


def _signed_halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high nibbles as two's complement integers, int8, by shifts that keep the
    sign: the fewest steps a CPU can take."""
    both, four = packed.astype(jnp.int8), jnp.int8(4)
    return (both << four) >> four, both >> four


def signed_nibbles(codes: jax.Array) -> jax.Array:
    """Nibbles as two's complement integers, int8: 0xF -> -1."""
    return (codes ^ 8).astype(jnp.int8) - 8
