"""GGUF files out: metadata, tensor descriptions, then the data, one tensor in memory at a time.

The file appears under its name only when all of it is on the disk.
"""

import contextlib
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize

from llama_jax.formats.atomic import check_parents, naming
from llama_jax.formats.gguf_fields import Entry
from llama_jax.formats.gguf_header import DEFAULT_ALIGNMENT, MAGIC, SCALARS
from llama_jax.formats.gguf_reader import CHUNK_ELEMENTS
from llama_jax.formats.json_fields import check_characters
from llama_jax.formats.safetensors import convert

_VERSION = 3

# Each block of 32 has a float16 scale: 1/127 or 1/8 of its largest magnitude, or 1/15 of its range
# with its least value beside it, in float16 too.
_HALF = float(np.finfo(np.float16).max)
_BLOCK_LIMITS = {
    GGMLQuantizationType.Q8_0: 127 * _HALF,
    GGMLQuantizationType.Q4_0: 8 * _HALF,
    GGMLQuantizationType.Q4_1: _HALF,
}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write: `shape` in NumPy's order and the type it is stored in."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        block_elements, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block_elements * block_bytes


Fetch = Callable[[TensorPlan], np.ndarray]


def write_gguf(
    path: str | Path,
    entries: Sequence[Entry],
    plans: Sequence[TensorPlan],
    fetch: Fetch,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a file, asking `fetch` for one float32 tensor at a time, in the order of `plans`.

    Raises ValueError naming the tensor for values its type cannot hold, and leaves nothing behind.
    """
    with _atomic_file(Path(path), overwrite=overwrite) as file:
        file.write(MAGIC + struct.pack("<IQQ", _VERSION, len(plans), len(entries)))
        for entry in entries:
            check_characters(entry.key, f"the metadata key {entry.key!r}")
            file.write(_text(entry.key) + struct.pack("<I", entry.kind) + _value(entry))
        offset = 0
        for plan in plans:
            file.write(_text(plan.name) + struct.pack("<I", len(plan.shape)))
            file.write(struct.pack(f"<{len(plan.shape)}Q", *reversed(plan.shape)))
            file.write(struct.pack("<IQ", plan.kind, offset))
            offset += plan.num_bytes + -plan.num_bytes % DEFAULT_ALIGNMENT
        _pad(file)
        for plan in plans:
            file.write(encode(plan, fetch(plan)))
            _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(entry: Entry) -> bytes:
    if entry.kind == GGUFValueType.STRING:
        check_characters(entry.value, entry.key)
        return _text(entry.value)
    if entry.kind != GGUFValueType.ARRAY:
        return np.asarray(entry.value).astype(SCALARS[entry.kind]).tobytes()
    assert entry.item_kind is not None
    head = struct.pack("<IQ", entry.item_kind, len(entry.value))
    if entry.item_kind == GGUFValueType.STRING:
        return head + b"".join(map(_text, entry.value))
    return head + np.asarray(entry.value, SCALARS[entry.item_kind]).tobytes()


def encode(plan: TensorPlan, values: np.ndarray) -> Any:
    """The bytes of a float32 tensor in the plan's type."""
    assert values.shape == plan.shape, (plan, values.shape)
    values = np.ascontiguousarray(values, np.float32)
    match plan.kind:
        case GGMLQuantizationType.F32:
            return values.data
        case GGMLQuantizationType.F16:
            return convert(values, np.dtype(np.float16), name=plan.name).data
        case GGMLQuantizationType.BF16:
            wide = convert(values, np.dtype(ml_dtypes.bfloat16), name=plan.name)
            return wide.view(np.uint16).data
        case _:
            return _blocks(plan, values)


def _blocks(plan: TensorPlan, values: np.ndarray) -> bytes:
    limit = _BLOCK_LIMITS[plan.kind]
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= limit:  # also true of NaN
        raise ValueError(
            f"tensor {plan.name!r} has magnitudes of up to {largest}, which "
            f"{plan.kind.name.lower()} cannot hold (at most {limit:.6g}); use bf16 or f32"
        )
    flat = values.reshape(-1)
    # A row at a time, for the same reasons as in reading.
    pieces = range(0, flat.size, CHUNK_ELEMENTS)
    return b"".join(
        quantize(flat[None, low : low + CHUNK_ELEMENTS], plan.kind).tobytes() for low in pieces
    )


@contextlib.contextmanager
def _atomic_file(target: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file under a temporary name that becomes `target` when the block ends without an error."""
    target = Path(os.path.realpath(target))
    check_file_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.tmp-", dir=target.parent)
    temporary = Path(name)
    try:
        with naming(target), open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        # Another process may have written the target in the meantime.
        check_file_target(target, overwrite=overwrite)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_file_target(target: Path, *, overwrite: bool) -> None:
    """Raises ValueError unless a GGUF file may be written at `target`."""
    if target.suffix != ".gguf":
        raise ValueError(f"{target} does not end in .gguf; give the file such a name")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file in it")
    check_parents(target)
    if target.exists() and not overwrite:
        raise ValueError(
            f"{target} exists; choose another name or allow overwriting (overwrite=True, "
            f"--overwrite)"
        )
