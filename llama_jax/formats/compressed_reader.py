"""Matrices of a compressed-tensors folder as quantized leaves: the file's codes and scales.

Codes are moved from the mapped files to where they will lie, packed ones as the bytes they are;
scales become float32, which holds all of them. What the folder must hold is here too.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwix import QArray

from llama_jax.config import FLOAT_DTYPES
from llama_jax.formats.compressed_config import Stored, modules
from llama_jax.formats.compressed_kind import HIGH_BITS
from llama_jax.formats.safetensors import SafetensorsFile
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import Float8Tensor, IntegerTensor, PackedTensor
from llama_jax.weights.table import Weight

# Shapes and dtypes that a tensor of a file may have.
Allowed = tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]
_ONE = ((1,), ())
# What changes the numbers, and should have been said in config.json.
UNREAD_TENSORS = {
    "weight_zero_point": "asymmetric weights are",
    "input_zero_point": "asymmetric inputs are",
    "weight_g_idx": "columns in an order of their own are",
    "weight_global_scale": "scales of scales are",
    "input_global_scale": "scales of scales are",
    "k_scale": "a quantized cache is",
    "v_scale": "a quantized cache is",
    "output_scale": "quantized outputs, and a quantized cache, are",
}


def allowed_tensors(row: Weight, stored: Stored) -> Iterator[tuple[str, Allowed]]:
    """Names of the tensors that hold a matrix, all layers together, with what they may be."""
    out, size = row.shape[-2:]
    kind = stored.kind
    if stored.is_packed:
        parts: dict[str, Allowed] = {
            "weight_packed": (((out, kind.num_words(size)),), ("int32",)),
            "weight_shape": (((2,),), ("int64", "int32")),
        }
    else:
        parts = {"weight": (((out, size),), (kind.code_dtype.name,))}
    scales: tuple[tuple[int, ...], ...] = ((out, kind.num_tiles(size)),)
    if stored.per_tensor:
        scales = (*_ONE, (1, 1))
    elif kind.tile is None:
        scales = (*scales, (out,))
    parts["weight_scale"] = (scales, FLOAT_DTYPES)
    if kind.activations == "static":
        parts["input_scale"] = (_ONE, FLOAT_DTYPES)
    for module in modules(row):
        for part, allowed in parts.items():
            yield f"{module}.{part}", allowed


def check_shapes(
    row: Weight, stored: Stored, tensors: Mapping[str, SafetensorsFile]
) -> Iterator[str]:
    """What is wrong with the shapes that packed matrices say they have."""
    if not stored.is_packed:
        return
    for module in modules(row):
        name = f"{module}.weight_shape"
        found = tensors[name].view(name).tolist()
        if found != list(row.shape[-2:]):
            yield f"{name} says {found}, expected {list(row.shape[-2:])}"


def abstract_leaf(row: Weight, stored: Stored) -> Leaf:
    """The quantized leaf of a row of the weight table, with shape structs for arrays."""
    *lead, size = row.shape
    kind = stored.kind
    scale = jax.ShapeDtypeStruct((*lead, kind.num_tiles(size)), jnp.float32)
    base: Leaf
    if kind.bits == 4:
        packed = jax.ShapeDtypeStruct((*lead, math.ceil(size / 2)), jnp.uint8)
        base = PackedTensor(packed, scale, "int4", size, kind.tile or size)
    else:
        base = QArray(jax.ShapeDtypeStruct(row.shape, kind.code_dtype), scale)
    if kind.activations is None:
        return base
    static = kind.activations == "static"
    inputs = jax.ShapeDtypeStruct(row.shape[:-2], jnp.float32) if static else None
    return (Float8Tensor if kind.is_float else IntegerTensor)(base, inputs)


@dataclass(frozen=True)
class Matrix:
    """One matrix in the files, whose rows have `size` values."""

    tensors: Mapping[str, SafetensorsFile]
    module: str
    stored: Stored
    size: int

    def copy_array(self, array: str, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Copies the part `index` of an array, named as in the leaf, into `out`."""
        if array == "activation_scale":
            out[...] = self._one_number("input_scale")
        elif array == "scale":
            self._copy_scale(out, index)
        elif self.stored.is_packed:
            self._copy_codes(out.view(np.uint8), index)
        else:
            self._copy("weight", out, index)

    def _copy_codes(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        bits = self.stored.kind.bits
        self._copy("weight_packed", out, index, as_bytes=True)
        np.bitwise_xor(out, HIGH_BITS[bits], out=out)
        if bits == 4 and self.size % 2 and index[-1].stop == (self.size + 1) // 2:
            out[:, -1] &= np.uint8(0x0F)  # the half of a byte behind the row

    def _copy_scale(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        name = f"{self.module}.weight_scale"
        if self.stored.per_tensor:
            out[...] = self._one_number("weight_scale")
        elif len(self.tensors[name].header.tensors[name].shape) == 1:
            self._copy("weight_scale", out[:, 0], index[:1])
        else:
            self._copy("weight_scale", out, index)

    def _copy(
        self, part: str, out: np.ndarray, index: tuple[slice, ...], *, as_bytes: bool = False
    ) -> None:
        name = f"{self.module}.{part}"
        self.tensors[name].copy_to(out, name, index, as_bytes=as_bytes)

    def _one_number(self, part: str) -> Any:
        name = f"{self.module}.{part}"
        return self.tensors[name].view(name).reshape(()).astype(np.float32)
