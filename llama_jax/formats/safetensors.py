"""Safetensors files: a header checked before anything is allocated, mapped reads, streamed writes.

A file is eight bytes with the header's length, a JSON header that gives each tensor's dtype, shape
and byte range, and the bytes. The reader trusts none of it: every length is checked against the
file before an array exists, so a hostile or truncated file costs milliseconds. The writer holds
one tensor at a time. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The reference implementation's limit on the header.
MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 32
# How much of a mapped file a copy touches before it hands the pages back.
_CHUNK_BYTES = 4 << 20


class SafetensorsError(ValueError):
    """A file that is not a complete, well-formed safetensors file."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are byte offsets from the file's beginning."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The checked header of a file.

    Raises SafetensorsError, naming the file and the tensor, unless the header is well formed, all
    dtypes are known, every byte range has exactly its tensor's size, and the ranges fill the file
    without hole, overlap or remainder.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SafetensorsError(f"{path}: {size} bytes is too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise SafetensorsError(
                f"{path}: the first eight bytes declare a header of {length} bytes; it must be "
                f"between 2 and {MAX_HEADER_BYTES} and fit in the file's {size} bytes. The file "
                f"is damaged or is not a safetensors file"
            )
        text = file.read(length)
    entries = _parse_json(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = [_tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()]
    _check_layout(path, tensors, begin=8 + length, size=size)
    return Header(path, {info.name: info for info in tensors}, metadata)


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, item in pairs:
            if name in result:
                raise SafetensorsError(f"{path}: {name!r} appears twice in the header")
            result[name] = item
        return result

    if not text.startswith(b"{"):
        raise SafetensorsError(f"{path}: the header does not start with '{{'")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except SafetensorsError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"{path}: the header is not valid JSON: {error}") from error
    assert isinstance(value, dict)
    return value


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SafetensorsError(f"{path}: __metadata__ must map strings to strings")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(path: Path, name: str, entry: Any, begin: int) -> TensorInfo:
    def fail(problem: str) -> SafetensorsError:
        return SafetensorsError(f"{path}: tensor {name!r}: {problem}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("its header entry must hold exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise fail(f"unknown dtype {dtype_name!r}; known are {', '.join(DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_RANK
        or not all(_is_count(n) for n in shape)
    ):
        raise fail(f"shape must be a list of at most {_MAX_RANK} sizes, not {str(shape)[:200]}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_count(n) for n in offsets)
        or offsets[0] > offsets[1]
    ):
        raise fail(f"data_offsets must be [begin, end], not {str(offsets)[:200]}")
    dtype = DTYPES[dtype_name]
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise fail(
            f"its offsets {offsets} hold {offsets[1] - offsets[0]} bytes, but {dtype_name} of "
            f"shape {shape} takes {expected}"
        )
    return TensorInfo(name, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _check_layout(path: Path, tensors: list[TensorInfo], *, begin: int, size: int) -> None:
    position = begin
    for info in sorted(tensors, key=lambda info: (info.start, info.end)):
        if info.end > size:
            raise SafetensorsError(
                f"{path}: tensor {info.name!r} ends at byte {info.end}, but the file has {size} "
                f"bytes; it was cut short, download or copy it again"
            )
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "leaves a hole"
            raise SafetensorsError(
                f"{path}: tensor {info.name!r} starts at byte {info.start} where {position} was "
                f"expected: it {problem}"
            )
        position = info.end
    if position != size:
        raise SafetensorsError(
            f"{path}: the file has {size} bytes, but its header accounts for {position}"
        )


class SafetensorsFile:
    """A file mapped read-only. Views stay valid as long as they are referenced."""

    def __init__(self, path: str | Path) -> None:
        self.header = read_header(path)
        with self.header.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._map) != self._size():
            raise SafetensorsError(f"{path}: the file changed while it was opened")

    def _size(self) -> int:
        return max((info.end for info in self.header.tensors.values()), default=len(self._map))

    def __contains__(self, name: str) -> bool:
        return name in self.header.tensors

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the mapped file: nothing is copied."""
        info = self.header.tensors[name]
        flat = np.frombuffer(self._map, info.dtype, count=math.prod(info.shape), offset=info.start)
        return flat.reshape(info.shape)

    def copy_to(
        self, out: np.ndarray, name: str, index: tuple[slice, ...], *, as_bytes: bool = False
    ) -> None:
        """Copies `tensor[index]` into `out`, converting to its dtype. as_bytes: the tensor is taken
        for its bytes, of which a row has more than values.

        The copy goes through the file in pieces and gives each piece's pages back to the kernel,
        so the mapped file adds only a constant to the process's resident memory.
        """
        whole = self.view(name)
        source = (whole.view(np.uint8) if as_bytes else whole)[index]
        if source.ndim == 0:
            out[...] = convert(source, out.dtype, name=name, file=self.header.path)
            return
        info = self.header.tensors[name]
        # Bytes of the file that one step along the first dimension spans, sliced or not.
        row_bytes = max(info.dtype.itemsize, (info.end - info.start) // max(info.shape[0], 1))
        rows = max(1, _CHUNK_BYTES // row_bytes)
        first = index[0].indices(info.shape[0])[0] if index else 0
        for low in range(0, len(source), rows):
            piece = source[low : low + rows]
            out[low : low + rows] = convert(piece, out.dtype, name=name, file=self.header.path)
            start = info.start + (first + low) * row_bytes
            self._release(start, start + len(piece) * row_bytes)

    def _release(self, start: int, end: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):  # only some systems can be told
            return
        start -= start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def convert(
    array: np.ndarray, dtype: np.dtype[Any], *, name: str, file: Path | None = None
) -> np.ndarray:
    """`array` in `dtype`, rounded to nearest; the same array where that changes nothing. `name` and
    the `file` that is read are for the message.

    Raises ValueError where a finite value is too large for `dtype`, instead of writing infinity.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not np.isfinite(result).all() and np.isfinite(array[~np.isfinite(result)]).any():
        where = "" if file is None else f"{file}: "
        raise ValueError(
            f"{where}tensor {name!r} has values of up to "
            f"{np.abs(array[np.isfinite(array)]).max()}, which {dtype} cannot hold; use bfloat16 "
            f"or float32"
        )
    return result


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before its values are at hand."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Fetch = Callable[[TensorSpec], np.ndarray]


def write_file(
    path: str | Path,
    specs: Sequence[TensorSpec],
    fetch: Fetch,
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes one file, asking `fetch` for one tensor at a time in the file's order.

    Arrays of any memory layout may be handed in: they are written in C order. The file is flushed
    to the disk before this returns.
    """
    # Wide dtypes first, as the reference writer does: it keeps every tensor aligned.
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for spec in ordered:
        if spec.name in entries or spec.name == "__metadata__":
            raise ValueError(f"tensor name {spec.name!r} is taken; names must be unique")
        if spec.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"tensor {spec.name!r} is {spec.dtype}, which safetensors cannot hold; cast it to "
                f"one of {', '.join(str(dtype) for dtype in DTYPE_NAMES)}"
            )
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.num_bytes],
        }
        position += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for spec in ordered:
            file.write(_bytes_of(fetch(spec), spec).data)
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    if array.dtype != spec.dtype or array.shape != spec.shape:
        raise ValueError(
            f"tensor {spec.name!r} was announced as {spec.dtype} {spec.shape}, but "
            f"{array.dtype} {array.shape} came"
        )
    # A transposed view must be laid out in C order first. The bytes go out through uint8, since
    # neither bfloat16 nor float8 is known to the buffer protocol.
    flat = np.ascontiguousarray(array).reshape(-1)
    assert flat.flags.c_contiguous
    return flat.view(np.uint8)


def plan_shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Splits tensors, in order, into files of at most `max_bytes` of data.

    A tensor larger than that gets a file of its own.
    """
    if max_bytes <= 0:
        raise ValueError(f"the largest shard size must be positive, not {max_bytes} bytes")
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.num_bytes
    return shards


def write_sharded(
    folder: str | Path,
    specs: Sequence[TensorSpec],
    fetch: Fetch,
    *,
    max_shard_bytes: int,
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """Writes `model.safetensors`, or numbered shards and then their index. Returns the files.

    The index is written last: without it, shards alone are no model.
    """
    folder = Path(folder)
    shards = plan_shards(specs, max_shard_bytes)
    if len(shards) == 1:
        path = folder / "model.safetensors"
        write_file(path, shards[0], fetch, metadata=metadata)
        return [path]
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, fetch, metadata=metadata)
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in specs)},
        "weight_map": {
            spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard
        },
    }
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*(folder / name for name in names), path]


def write_arrays(
    path: str | Path, arrays: dict[str, np.ndarray], *, metadata: dict[str, str] | None = None
) -> None:
    """`write_file` for arrays that are all in memory."""
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_file(path, specs, lambda spec: arrays[spec.name], metadata=metadata)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(size: int | str) -> int:
    """`"5GB"` -> 5_000_000_000, `"2GiB"` -> 2_147_483_648; an integer is itself."""
    if not isinstance(size, str):
        count = size if isinstance(size, int) and not isinstance(size, bool) else math.nan
    else:
        text = size.strip().upper()
        number = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ").strip()
        unit = text[len(number) :].strip()
        try:
            count = float(number) * _UNITS[unit]
        except (ValueError, KeyError):
            count = math.nan
    if not count >= 1 or math.isinf(count):
        raise ValueError(
            f"{size!r} is not a size; give bytes or a number with KB, MB, GB, KiB, MiB or GiB, "
            f"such as '5GB'"
        )
    return int(count)
