"""Compressed files, read no further than a file of rows can reach.

A megabyte of packed zeros unpacks to gigabytes, and a line without an end is held whole. Rows of
text pack to a tenth or a fiftieth; what unpacks to far more is no file of rows.
"""

import io
from typing import Any, BinaryIO

MAX_RATIO = 200
# Small files may be as repetitive as they like.
FREE_BYTES = 64 << 20


class BoundedReader(io.RawIOBase):
    """`file`, unpacked from `packed_bytes`, up to `MAX_RATIO` times as many and `FREE_BYTES`.

    Raises ValueError naming `shown` for what goes on beyond.
    """

    def __init__(self, file: BinaryIO, *, packed_bytes: int, shown: str):
        self._file, self._shown, self._packed = file, shown, packed_bytes
        self._left = FREE_BYTES + MAX_RATIO * packed_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"{self._shown} unpacks to over {MAX_RATIO} times its {self._packed} bytes, which "
                f"no file of rows does; if it is one, unpack it yourself"
            )
        buffer[: len(data)] = data
        return len(data)
