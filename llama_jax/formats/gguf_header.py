"""The header of a GGUF file, checked before anything is allocated.

A file is a magic number, a version, the counts of tensors and of metadata entries, the entries, a
description of each tensor, and the data, each tensor at a multiple of the alignment. None of these
numbers is trusted: each is checked against the size of the file before it is used, so a hostile or
truncated file costs milliseconds. The `gguf` package gives the layout of the block formats and
decodes them; its own reader, which trusts the counts, is not used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

MAGIC = b"GGUF"
READ_VERSIONS = (2, 3)  # version 1 counted in 32 bits; no such file has been made since 2023
DEFAULT_ALIGNMENT = 32

SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}

# Far above any published file, low enough to be harmless. The specification allows keys of 65535
# bytes and ggml four dimensions.
_MAX_KEY_BYTES = 65535
_MAX_STRING_BYTES = 1 << 28
_MAX_ARRAY_LENGTH = 10_000_000
_MAX_RANK = 4
# The shortest possible entries, to check the counts against the bytes that are there.
_MIN_ENTRY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

_U64 = struct.Struct("<Q")


class GGUFError(ValueError):
    """A file that is not a complete, well-formed GGUF file, or not one that can be read."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: `shape` in NumPy's order, `start` and `num_bytes` in the file. The last dimension
    is stored as blocks of `block_elements` values in `block_bytes` bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def block_elements(self) -> int:
        return GGML_QUANT_SIZES[self.kind][0]

    @property
    def block_bytes(self) -> int:
        return GGML_QUANT_SIZES[self.kind][1]


class Header:
    """The parse of a mapped file: a position that only moves over bytes known to exist.

    Leaves `metadata` (key to value) and `tensors` (name to description). Strings are `str`, arrays
    of strings lists, arrays of numbers NumPy arrays. A float32 becomes the float with the shortest
    decimal form that rounds to it: a file that stores 1e-05 in single precision says 1e-05, not
    9.999999747378752e-06. Raises GGUFError naming the file and the field.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size, self._pos = path, data, len(data), 0
        self._check_version()
        num_tensors = self._count("the tensor count")
        num_entries = self._count("the metadata count")
        self._check_count("tensors", num_tensors, _MIN_TENSOR_BYTES)
        self._check_count("metadata entries", num_entries, _MIN_ENTRY_BYTES)
        self.metadata: dict[str, Any] = {}
        for number in range(num_entries):
            key = self._name(f"the key of metadata entry {number}")
            if key in self.metadata:
                self._fail(key, "appears twice")
            self.metadata[key] = self._value(key, self._number(key, "<u4"))
        self._alignment = self._read_alignment()
        described = [self._tensor(number) for number in range(num_tensors)]
        begin = -(-self._pos // self._alignment) * self._alignment
        self.tensors = self._placed(described, begin)

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise GGUFError(f"{self._path}: {field}: {problem}")

    def _take(self, num_bytes: int, field: str) -> int:
        """Moves over `num_bytes` and returns where they begin."""
        if num_bytes > self._size - self._pos:
            self._fail(
                field,
                f"needs {num_bytes} bytes at byte {self._pos}, but the file has {self._size}; it "
                f"was cut short or damaged, download or copy it again",
            )
        begin = self._pos
        self._pos += num_bytes
        return begin

    def _number(self, field: str, kind: str) -> Any:
        dtype = np.dtype(kind)
        begin = self._take(dtype.itemsize, field)
        return np.frombuffer(self._data, dtype, count=1, offset=begin)[0].item()

    def _count(self, field: str) -> int:
        return _U64.unpack_from(self._data, self._take(8, field))[0]

    def _name(self, field: str) -> str:
        name = self._string(field, _MAX_KEY_BYTES)
        if not name:
            self._fail(field, "is empty")
        return name

    def _string(self, field: str, limit: int) -> str:
        length = self._count(f"the length of {field}")
        if length > limit:
            self._fail(field, f"a string of {length} bytes; at most {limit} are allowed")
        begin = self._take(length, field)
        try:
            return self._data[begin : self._pos].decode("utf-8")
        except UnicodeDecodeError as error:
            self._fail(field, f"is not UTF-8: {error}")

    def _check_version(self) -> None:
        if self._data[self._take(4, "the magic number") : 4] != MAGIC:
            self._fail("the magic number", f"is {self._data[:4]!r}, so this is not a GGUF file")
        version = self._number("the version", "<u4")
        if version & 0xFFFF == 0:
            self._fail(
                "the version",
                "is stored big-endian; convert the file with gguf-py's gguf-convert-endian",
            )
        if version not in READ_VERSIONS:
            allowed = " and ".join(str(known) for known in READ_VERSIONS)
            self._fail("the version", f"is {version}; versions {allowed} can be read")

    def _check_count(self, what: str, count: int, least: int) -> None:
        if count > (self._size - self._pos) // least:
            self._fail(
                f"the number of {what}",
                f"is {count}, which cannot fit in the {self._size} bytes of the file",
            )

    def _value(self, key: str, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string(key, _MAX_STRING_BYTES)
        if kind == GGUFValueType.ARRAY:
            return self._array(key)
        if kind not in SCALARS:
            self._fail(key, f"has the unknown value type {kind}")
        value = self._number(key, SCALARS[kind])
        if kind == GGUFValueType.BOOL:
            if value > 1:
                self._fail(key, f"is a boolean with the value {value}; it must be 0 or 1")
            return bool(value)
        return shortest_float(value) if kind == GGUFValueType.FLOAT32 else value

    def _array(self, key: str) -> Any:
        kind, length = self._number(key, "<u4"), self._count(f"the length of {key}")
        if length > _MAX_ARRAY_LENGTH:
            self._fail(key, f"an array of {length} elements; {_MAX_ARRAY_LENGTH} are allowed")
        if kind == GGUFValueType.STRING:
            if length * 8 > self._size - self._pos:
                self._take(length * 8, key)  # raises: each string has at least its length
            return self._strings(key, length)
        if kind not in SCALARS:
            self._fail(key, f"is an array of the unsupported value type {kind}")
        dtype = np.dtype(SCALARS[kind])
        begin = self._take(length * dtype.itemsize, key)
        values = np.frombuffer(self._data, dtype, count=length, offset=begin).copy()
        return values.astype(bool) if kind == GGUFValueType.BOOL else values

    def _strings(self, key: str, length: int) -> list[str]:
        # Vocabularies have hundreds of thousands: `_string` without the calls.
        data, size, pos, unpack = self._data, self._size, self._pos, _U64.unpack_from
        strings = []
        try:
            for _ in range(length):
                (count,) = unpack(data, pos)
                pos += 8
                if count > size - pos:
                    raise struct.error
                strings.append(data[pos : pos + count].decode("utf-8"))
                pos += count
        except struct.error:
            self._fail(f"{key}[{len(strings)}]", f"a string goes beyond the file's {size} bytes")
        except UnicodeDecodeError as error:
            self._fail(f"{key}[{len(strings)}]", f"is not UTF-8: {error}")
        self._pos = pos
        return strings

    def _read_alignment(self) -> int:
        key = "general.alignment"
        value = self.metadata.get(key, DEFAULT_ALIGNMENT)
        power = isinstance(value, int) and value > 0 and value & (value - 1) == 0
        if isinstance(value, bool) or not power:
            self._fail(key, f"is {value!r}; it must be a power of two")
        return value

    def _tensor(self, number: int) -> GGUFTensor:
        """A tensor's description, whose `start` still counts from where the data begin."""
        name = self._name(f"the name of tensor {number}")
        field = f"tensor {name!r}"
        rank = self._number(field, "<u4")
        if not 1 <= rank <= _MAX_RANK:
            self._fail(field, f"has {rank} dimensions; it must have 1 to {_MAX_RANK}")
        begin = self._take(8 * rank, field)
        shape = tuple(reversed(struct.unpack_from(f"<{rank}Q", self._data, begin)))
        number_of_kind = self._number(field, "<u4")
        start = self._count(field)
        elements = math.prod(shape)
        if not 0 < elements < 2**63:
            self._fail(field, f"has the impossible shape {list(shape)}")
        try:
            kind = GGMLQuantizationType(number_of_kind)
        except ValueError:
            self._fail(field, f"has the unknown type {number_of_kind}")
        if not is_readable(kind):
            self._fail(field, f"has type {kind.name}, which cannot be decoded")
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_elements:
            self._fail(
                field,
                f"has rows of {shape[-1]} values, not a multiple of the {block_elements} in a "
                f"block of {kind.name}",
            )
        num_bytes = elements // block_elements * block_bytes
        return GGUFTensor(name, kind, shape, start, num_bytes)

    def _placed(self, described: list[GGUFTensor], begin: int) -> dict[str, GGUFTensor]:
        """The tensors at their places in the file, which must be aligned, inside, and apart."""
        tensors: dict[str, GGUFTensor] = {}
        end = begin
        for tensor in sorted(described, key=lambda tensor: tensor.start):
            field = f"tensor {tensor.name!r}"
            start = begin + tensor.start
            if tensor.start % self._alignment:
                self._fail(field, f"its offset {tensor.start} is not aligned to {self._alignment}")
            if start + tensor.num_bytes > self._size:
                self._fail(
                    field,
                    f"ends at byte {start + tensor.num_bytes}, but the file has {self._size} "
                    f"bytes; it was cut short, download or copy it again",
                )
            if start < end:
                self._fail(field, "overlaps the tensor before it")
            if tensor.name in tensors:
                self._fail(field, "appears twice")
            end = start + tensor.num_bytes
            tensors[tensor.name] = GGUFTensor(
                tensor.name, tensor.kind, tensor.shape, start, tensor.num_bytes
            )
        return tensors


@functools.cache
def is_readable(kind: GGMLQuantizationType) -> bool:
    """Whether the `gguf` package decodes this type; asked of it with one block of zeros."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def shortest_float(value: float) -> float:
    """The float with the shortest decimal form among those that round to the float32 `value`."""
    return float(str(np.float32(value)))
