"""The kinds of weight leaf: a plain array, quantized tensors, adapted tensors.

Eight-bit tensors are Qwix's `QArray` (int8 and fp8 values, scales per channel or tile), four-bit
ones are `PackedTensor`: a CPU stores an int4 array in one byte a value. Their scales may be packed
too, in eight bits (`PackedScale`). Where activations are rounded as well and the product is one of
integers, either lies in an `IntegerTensor`. Adapters are `LoraTensor` and `SavedTensor`. Every leaf
has the shape of the matrix it stands for. What multiplies them is in `dot.py`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix
from qwix import QArray

from llama_jax.weights.qat import Backward, codes

# jax.Array | QArray | PackedTensor | IntegerTensor | QatTensor | DecodingTensor | TappedTensor |
# LoraTensor | StackedLora | SavedTensor
Leaf = Any
# An array, or what stands for one in a tree of shardings, shapes or booleans.
Array = Any

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IntegerTensor:
    """A matrix of int8 or int4 values that activations are multiplied with as integers.

    base: int8 values in a QArray or int4 ones in a PackedTensor, a float32 scale for each output
    or for each tile of a row. Activations are rounded to int8 first: with a scale of their own for
    each token (and tile) where activation_scale is None, else with that, [...], one number for each
    matrix of the stack.
    """

    base: QArray | PackedTensor
    activation_scale: Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

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
class QatTensor:
    """A matrix in training, [..., out, in], that is rounded to int8 or int4 in every product, and
    activations to int8; `backward` says how gradients pass (see `weights/qat.py`)."""

    weight: Array
    bits: int = field(metadata={"static": True})
    backward: Backward = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def ndim(self) -> int:
        return len(self.weight.shape)

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def dequantize(self) -> jax.Array:
        """The matrix that products are made with, in float32."""
        flat = self.weight.astype(jnp.float32).reshape(-1, self.shape[-1])
        values, scale = codes(flat, bits=self.bits)
        return (values.astype(jnp.float32) * scale).reshape(self.shape)


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodingTensor:
    """A matrix [out, in], an array or a quantized leaf, that meets few rows at a time on a CPU.

    alike_rows: where it is not 0, a row's result has the same bits in products of two rows as in
    those of so many, and of any number between.
    """

    array: Array
    alike_rows: int = field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        return len(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraTensor:
    """A matrix W with a low-rank update: W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685).

    base: [..., out, in], any other leaf; lora_a: [..., R, in]; lora_b: [..., out, R];
    scale: [...], alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv:2312.03732), for each
    layer. Layers stack on the leading dimensions and may have different ranks: R is the largest,
    the rest is zero in both factors and so gets zero gradients and stays zero. `ranks` holds the
    true rank of each matrix of the stack, row-major (0: no adapter here); it describes the whole
    stack and travels unchanged with its slices.
    """

    base: Leaf
    lora_a: Array
    lora_b: Array
    scale: Array
    ranks: tuple[int, ...] = field(metadata={"static": True})
    use_rslora: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def delta(self) -> jax.Array:
        """scale * B @ A in float32, [..., out, in]."""
        product = jnp.einsum(
            "...or,...ri->...oi",
            self.lora_b.astype(jnp.float32),
            self.lora_a.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return product * self.scale.astype(jnp.float32)[..., None, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DroppedLora(LoraTensor):
    """A `LoraTensor` within a training step: what goes into its factors is dropped out, as PEFT
    does it (Srivastava et al. 2014): each number is zero with probability `rate`, else divided by
    1 - rate. The base gets all of it. key: [..., 2] uint32, of each matrix of the stack; axis: of
    `jax.pmap`, where a device has a part of the rows and draws what it would have drawn for them
    among all."""

    key: Array
    rate: float = field(metadata={"static": True})
    axis: str | None = field(metadata={"static": True})

    def dropped(self, x: jax.Array) -> jax.Array:
        """x [T, in], for one matrix."""
        key = jax.random.wrap_key_data(self.key, impl="threefry2x32")
        rows, width = x.shape
        parts = 1 if self.axis is None else jax.lax.axis_size(self.axis)
        kept = jax.random.bernoulli(key, 1 - self.rate, (parts * rows, width))
        if self.axis is not None:
            own = jax.lax.axis_index(self.axis) * rows
            kept = jax.lax.dynamic_slice_in_dim(kept, own, rows)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedLora:
    """A matrix with several low-rank updates, of which each row of activations takes one.

    base: [out, in], any leaf without an adapter; lora_a: [in, A * R] and lora_b: [A * R, out],
    scales included, for A adapters of R = `rank`; chosen: [T], the adapter of each row, negative
    for none.
    """

    base: Leaf
    lora_a: Array
    lora_b: Array
    chosen: Array
    rank: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SavedTensor:
    """A weight trained whole beside its frozen original, as PEFT's `modules_to_save` has it.

    The model computes with `saved`; `base` is what it was before, kept so that the adapter can be
    taken off again.
    """

    base: Leaf
    saved: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.saved.shape

    @property
    def ndim(self) -> int:
        return len(self.saved.shape)

    @property
    def dtype(self) -> Any:
        return self.saved.dtype

    def astype(self, dtype: Any) -> jax.Array:
        """What the model computes with, for weights that are not multiplied: norms and biases."""
        return self.saved.astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TappedTensor:
    """A float32 matrix whose gradient is kept in bfloat16: as that of `tap`, which has its shape
    and whose values nobody reads. It lives inside the gradient of a step, and nowhere else."""

    array: Array
    tap: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def astype(self, dtype: Any) -> jax.Array:
        return _tapped(narrowed(self.array, dtype), self.tap)


@jax.custom_vjp
def _tapped(array: jax.Array, tap: jax.Array) -> jax.Array:
    del tap
    return array


def _tapped_forward(array: jax.Array, tap: jax.Array) -> tuple[jax.Array, jax.Array]:
    return array, tap


def _tapped_backward(tap: jax.Array, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, gradient.astype(tap.dtype)


_tapped.defvjp(_tapped_forward, _tapped_backward)


def is_adapted(leaf: Leaf) -> bool:
    """Whether the leaf holds something an adapter added."""
    return isinstance(leaf, LoraTensor | SavedTensor)


def is_quantized(leaf: Leaf) -> bool:
    return isinstance(leaf, QArray | PackedTensor | IntegerTensor)


def num_tiles(size: int, tile: int) -> int:
    return math.ceil(size / tile)


def to_array(leaf: Leaf, *, dtype: Any = jnp.float32) -> jax.Array:
    """The full matrix a leaf stands for, computed in float32 and rounded once to `dtype`."""
    if isinstance(leaf, jax.Array | TappedTensor):
        return narrowed(leaf, dtype)
    return _to_float32(leaf).astype(dtype)


def narrowed(array: jax.Array | TappedTensor, dtype: Any) -> jax.Array:
    """`array.astype(dtype)`, at the place where it is written.

    XLA moves a mere conversion of what a loop over layers reads out of the loop, and then holds
    the weights of all layers once more, in bfloat16, for the whole step: a float32 model of 8e9
    parameters on 16 chips takes 1.3 GB more on each. It leaves a rounding where it is.
    """
    if isinstance(array, TappedTensor):
        return array.astype(dtype)
    if array.dtype == jnp.float32 and jnp.dtype(dtype) == jnp.bfloat16:
        return _to_bfloat16(array)
    return array.astype(dtype)


@jax.custom_jvp
def _to_bfloat16(array: jax.Array) -> jax.Array:
    # As many bits of exponent as float32 has, so that nothing is flushed to zero on the way.
    kept = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(array, kept.nexp, kept.nmant).astype(jnp.bfloat16)


@_to_bfloat16.defjvp
def _tangent_of_bfloat16(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _to_float32(leaf: Leaf) -> jax.Array:
    if isinstance(leaf, LoraTensor):
        return _to_float32(leaf.base) + leaf.delta()
    if isinstance(leaf, SavedTensor):
        return _to_float32(leaf.saved)
    if isinstance(leaf, IntegerTensor):
        return _to_float32(leaf.base)
    if isinstance(leaf, PackedTensor | QatTensor):
        return leaf.dequantize()
    if isinstance(leaf, DecodingTensor):
        return _to_float32(leaf.array)
    if isinstance(leaf, QArray):
        return qwix.dequantize(leaf.astype(jnp.float32))
    return jnp.asarray(leaf).astype(jnp.float32)
