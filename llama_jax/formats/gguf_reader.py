"""GGUF files in: tensors decoded piece by piece, of which only the wanted part is touched."""

import mmap
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from llama_jax.formats.gguf_header import GGUFError, Header
from llama_jax.formats.meta_layout import meta_to_hf
from llama_jax.formats.safetensors import convert

# Decoded at one time: 256 KiB of float32 stays in the cache, which is four times as fast as a whole
# matrix at a time, and bounds what decoding allocates.
CHUNK_ELEMENTS = 1 << 16
# How much of the file is read before its pages are handed back.
_RELEASE_BYTES = 16 << 20


class GGUFFile:
    """A mapped file with its checked `metadata` and `tensors`, as `gguf_header.Header` gives them.

    Raises GGUFError naming the file and the field.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise GGUFError(f"{self.path} is not a file")
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise GGUFError(f"{self.path}: {size} bytes is too short for a GGUF file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._map) != size:
            raise GGUFError(f"{self.path}: the file changed while it was opened")
        self._num_touched = 0
        header = Header(self.path, self._map)
        self.metadata, self.tensors = header.metadata, header.tensors

    def read(
        self,
        name: str,
        out: np.ndarray,
        *,
        rows: slice,
        columns: slice,
        head_rows: int | None = None,
    ) -> None:
        """Decodes part of a tensor into `out` [rows, columns], converting to its dtype.

        All dimensions but the last count as rows, a vector is one row. With `head_rows` the tensor
        has heads of that many rows in Meta's order, and `out` gets them in Hugging Face's. `rows`
        may be any range, but whole heads are decoded.
        """
        tensor = self.tensors[name]
        group = head_rows or 1
        row_blocks = tensor.shape[-1] // tensor.block_elements
        row_bytes = row_blocks * tensor.block_bytes
        first, last = columns.start // tensor.block_elements, columns.stop
        last = -(-last // tensor.block_elements)
        width = (last - first) * tensor.block_elements
        inside = slice(
            columns.start - first * tensor.block_elements,
            columns.stop - first * tensor.block_elements,
        )
        step = max(1, CHUNK_ELEMENTS // (width * group)) * group
        whole = np.frombuffer(self._map, np.uint8, count=tensor.num_bytes, offset=tensor.start)
        data = whole.reshape(-1, row_blocks, tensor.block_bytes)
        for low in range(rows.start // group * group, rows.stop, step):
            high = min(low + step, -(-rows.stop // group) * group)
            blocks = np.ascontiguousarray(data[low:high, first:last]).reshape(1, -1)
            values = _decode(blocks, tensor.kind).reshape(high - low, width)[:, inside]
            if head_rows is not None:
                values = meta_to_hf(values, (high - low) // group)
            begin, end = max(low, rows.start), min(high, rows.stop)
            out[begin - rows.start : end - rows.start] = convert(
                values[begin - low : end - low], out.dtype, name=name, file=self.path
            )
            del blocks, values
            self._touched((high - low) * row_bytes)

    def _touched(self, num_bytes: int) -> None:
        """Hands pages back now and then, so that the file does not add up in resident memory.

        All of them, not only those of the tensor at hand: the kernel maps more than it is asked
        for, which is how a part of every neighbour would stay.
        """
        self._num_touched += num_bytes
        if self._num_touched >= _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._num_touched = 0


_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def _decode(blocks: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The values of contiguous bytes [1, n]: plain ones as they are, blocks in float32."""
    if kind in _PLAIN:
        return blocks.view(_PLAIN[kind])
    # As one row: the package decodes sixteen rows at a time, far too few to be fast.
    return dequantize(blocks, kind)
