"""Compressed files, read no further than a file of rows can reach.

A megabyte of packed zeros unpacks to gigabytes, and a line without an end is held whole. Rows of
text pack to a tenth or a fiftieth; what unpacks to far more is no file of rows.
"""

import io
from bz2 import BZ2Decompressor
from collections.abc import Callable
from lzma import LZMADecompressor
from typing import Any, BinaryIO

MAX_RATIO = 200
# Small files may be as repetitive as they like.
FREE_BYTES = 64 << 20

_PACKED_BYTES = 64 << 10


class Members(io.RawIOBase):
    """What the streams of a .bz2 or .xz file hold, one behind the other.

    Python's own files of these kinds take a damaged stream behind the first for the end of the file
    and say nothing; this raises what the decompressor does. Zeros between streams are padding.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], BZ2Decompressor | LZMADecompressor]):
        self._file, self._make = file, make
        self._unpacker = make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        packed, data = b"", b""
        while not data:
            if self._unpacker.eof:
                packed = self._unpacker.unused_data or self._file.read(_PACKED_BYTES)
                while packed and not (packed := packed.lstrip(b"\0")):
                    packed = self._file.read(_PACKED_BYTES)
                if not packed:
                    return 0
                self._unpacker = self._make()
            elif self._unpacker.needs_input:
                packed = self._file.read(_PACKED_BYTES)
                if not packed:
                    raise EOFError("it ends in the middle of what was compressed")
            data = self._unpacker.decompress(packed, len(buffer))
            packed = b""
        buffer[: len(data)] = data
        return len(data)


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
