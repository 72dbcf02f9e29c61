"""Files of rows, local or remote: JSON lines, JSON arrays, CSV, Parquet, also compressed."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from llama_jax.paths import to_path
from train.data.rows import OPTIONAL_KEYS, parse_json
from train.data.unpacking import BoundedReader, Members

PACKAGE_PREFIX = "package:"
# Values of one row as the file has them, and where they stand.
Values = tuple[str, Any]
Reader = Callable[[BinaryIO, str], Iterator[Values]]

_UNPACKERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": lambda file: Members(file, bz2.BZ2Decompressor),
    ".xz": lambda file: Members(file, lzma.LZMADecompressor),
}


def package_path(name: str) -> Path:
    """`package:demo/train.jsonl` -> where the package has it."""
    return Path(str(resources.files("llama_jax"))) / name.removeprefix(PACKAGE_PREFIX)


def find_files(name: str) -> tuple[Any, list[str]]:
    """(file system, paths in it) of a path, a URL, a glob, or a shipped `package:` file.

    A path that exists is taken as it is, whatever signs are in it; the files of a glob come in the
    order of their names. Raises FileNotFoundError where there is no such file, ValueError for a
    folder and for a protocol that is unknown here.
    """
    if not name.strip():
        raise ValueError("the name of the data file is empty; give a path")
    place = str(package_path(name)) if name.startswith(PACKAGE_PREFIX) else name
    try:
        if _is_local(place):
            # Not by url_to_fs, to which "::" in a name says that files lie in one another.
            files, path = fsspec.filesystem("file"), str(to_path(place).absolute())
        else:
            files, path = fsspec.url_to_fs(place)
    except ImportError as error:
        raise ValueError(
            f"{name}: {error}. The extra brings what gs:// needs: pip install 'llama-jax[data]'"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if files.isfile(path):
        return files, [path]
    if files.isdir(path):
        raise ValueError(
            f"{name} is a folder; name its files, for example {name.rstrip('/')}/*.jsonl"
        )
    found = sorted(p for p in files.glob(path) if files.isfile(p)) if set("*?[") & set(path) else []
    if not found and files.exists(path):
        raise ValueError(f"{name} is no regular file; rows are read twice, so give one that stays")
    if not found:
        raise FileNotFoundError(f"the data file {name} does not exist")
    return files, found


def _is_local(name: str) -> bool:
    return "://" not in name


def read_files(name: str) -> Iterator[Values]:
    """The rows of all files that `name` stands for, unchecked, each with its file and number.

    Raises ValueError for a file without rows, of an unknown ending, or that cannot be read.
    """
    files, paths = find_files(name)
    for path in paths:
        # What the user wrote, where it names one file.
        shown = name if len(paths) == 1 and not set("*?[") & set(name) else path
        found = False
        for values in _read_file(files, path, shown):
            found = True
            yield values
        if not found:
            raise ValueError(f"the data file {shown} holds no rows")


def _read_file(files: Any, path: str, shown: str) -> Iterator[Values]:
    read, unpack = _reader(path, shown)
    try:
        with files.open(path, "rb") as file:
            if unpack is None:
                yield from read(file, shown)
                return
            bounded = BoundedReader(unpack(file), packed_bytes=files.size(path), shown=shown)
            yield from read(io.BufferedReader(bounded), shown)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        # What is wrong with the packed bytes comes without a number of the operating system.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{shown} is damaged or not what its ending says: {error}") from error


def _reader(
    path: str, shown: str
) -> tuple[Callable[[BinaryIO, str], Iterator[Values]], Callable[[BinaryIO], Any] | None]:
    """What reads a file, told by its ending, and what unpacks a compressed one."""
    name = PurePosixPath(path)
    unpack = _UNPACKERS.get(name.suffix.lower())
    ending = (name.with_suffix("") if unpack else name).suffix.lower()
    if ending not in _READERS:
        raise ValueError(
            f"the data file {shown} ends in {ending or 'nothing'!r}; files of rows end in "
            f"{', '.join(_READERS)}, and may be compressed as {', '.join(_UNPACKERS)}"
        )
    return _READERS[ending], unpack


def _read_lines(file: BinaryIO, shown: str) -> Iterator[Values]:
    """A JSON object a line. Blank lines are skipped but counted."""
    # Split at line feeds alone: JSON strings may hold other line separators as they are.
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{shown}, line {number}"
            yield where, parse_json(line, where)


def _read_json(file: BinaryIO, shown: str) -> Iterator[Values]:
    """An array of rows, or lines of JSON, which many tools write under the same ending."""
    text = file.read().removeprefix(codecs.BOM_UTF8)
    if not text.lstrip().startswith(b"["):
        yield from _read_lines(io.BytesIO(text), shown)
        return
    for number, values in enumerate(parse_json(text, shown), start=1):
        yield f"{shown}, row {number}", values


def _read_csv(file: BinaryIO, shown: str) -> Iterator[Values]:
    """Rows under a header of column names; a cell of `messages` holds JSON."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    limit = csv.field_size_limit(sys.maxsize)  # the module's own is 128 KiB, short for a text
    where = shown
    try:
        reader = csv.DictReader(text, strict=True)
        _check_names(reader.fieldnames or (), shown)
        for number, cells in enumerate(reader, start=1):
            where = f"{shown}, row {number}"
            if None in cells or None in cells.values():
                raise ValueError(f"{where}: the row has not as many cells as the header has names")
            messages = cells.get("messages")
            parsed = {} if messages is None else {"messages": parse_json(messages, where)}
            yield where, {**cells, **parsed}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not CSV in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit)
        text.detach()  # the file is its opener's to close


def _read_parquet(file: BinaryIO, shown: str) -> Iterator[Values]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(
            f"{shown}: Parquet files need pyarrow: pip install 'llama-jax[data]'"
        ) from error
    number = 0
    try:
        # It is read from its end.
        source = parquet.ParquetFile(file if file.seekable() else io.BytesIO(file.read()))
        _check_names(source.schema_arrow.names, shown)
        for batch in source.iter_batches(batch_size=1024):
            try:
                rows = batch.to_pylist()
            except (OverflowError, ValueError) as error:
                raise ValueError(
                    f"{shown}, rows {number + 1} to {number + len(batch)}: a value is no text in "
                    f"UTF-8 or beyond what Python holds: {error}"
                ) from error
            for values in rows:
                number += 1
                yield f"{shown}, row {number}", without_nulls(values)
    except ArrowException as error:
        raise ValueError(f"{shown} is not a readable Parquet file: {error}") from error


def _check_names(names: Sequence[str], shown: str) -> None:
    """Raises ValueError for two columns of one name: one of them would be lost."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{shown}: the column {name!r} appears twice; rename one of them")


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Columns hold null where a row lacks an optional key; any other null is left to be named."""
    return {
        key: value for key, value in values.items() if value is not None or key not in OPTIONAL_KEYS
    }


_READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
