"""Rows from data-set libraries: TFDS, Hugging Face datasets, ArrayRecord files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from train.data.files import Values, find_files, without_nulls
from train.data.rows import parse_json


def read_array_record(name: str) -> Iterator[Values]:
    """The rows of ArrayRecord files, local ones, whose records are rows as JSON."""
    if "://" in name:
        raise ValueError(f"array_record {name}: ArrayRecord reads local files only; copy it first")
    _, paths = find_files(name)
    for path in paths:
        try:
            source = grain.sources.ArrayRecordDataSource(path)
            count = len(source)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable ArrayRecord file: {error}") from error
        if not count:
            raise ValueError(f"the data file {path} holds no rows")
        with source:
            for number in range(count):
                where = f"{path}, row {number + 1}"
                try:
                    record = source[number]
                except RuntimeError as error:
                    raise ValueError(f"{where}: damaged record: {error}") from error
                yield where, parse_json(record, where)


def read_tfds(name: str, *, split: str, data_dir: str | None) -> Iterator[Values]:
    """The rows of a prepared TFDS data set in ArrayRecord files; TensorFlow is not needed."""
    where = f"tfds {name}[{split}]"
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"{where}: needs tensorflow-datasets: pip install 'llama-jax[data]'"
        ) from error
    prepare = (
        f"Prepare it once with tfds.builder({name!r}, file_format='array_record')"
        f".download_and_prepare(), and name its data_dir unless it is the usual one"
    )
    try:
        source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    except (
        AssertionError,  # not prepared
        NotImplementedError,  # prepared in files without random access
        FileNotFoundError,
        ValueError,  # not known, or without this split
    ) as error:
        # The first line: TFDS goes on with the names of all the data sets it knows.
        raise ValueError(f"{where}: {str(error).splitlines()[0]} {prepare}") from error
    if not len(source):
        raise ValueError(f"{where} holds no rows")
    for number in range(len(source)):
        values = source[number]
        yield f"{where}, row {number + 1}", {key: _plain(item) for key, item in values.items()}


def _plain(value: Any) -> Any:
    """TFDS gives bytes for text, arrays for lists, and a dictionary of lists for a list of
    dictionaries."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        plain = {key: _plain(item) for key, item in value.items()}
        lists = [item for item in plain.values() if isinstance(item, list)]
        if lists and len(lists) == len(plain):
            return [dict(zip(plain, items, strict=True)) for items in zip(*lists, strict=True)]
        return plain
    return value


def read_datasets(
    name: str, *, split: str | None, config: str | None, data_dir: str | None
) -> Iterator[Values]:
    """The rows of a Hugging Face data set: a folder that `save_to_disk` wrote, or whatever
    `load_dataset` takes."""
    where = f"datasets {name}" + (f"[{split}]" if split else "")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{where}: needs the library datasets: pip install 'llama-jax[data]'"
        ) from error
    try:
        if _is_saved(name):
            for field, value in (("config", config), ("data_dir", data_dir)):
                if value is not None:
                    raise ValueError(
                        f"{field} is {value!r}, but this folder of save_to_disk holds one data "
                        f"set, which lies in it; leave {field} out"
                    )
            source = _saved_split(datasets.load_from_disk(name), split)
        elif split is None:
            raise ValueError("a data set has splits; say which in split, for example train")
        else:
            source = datasets.load_dataset(name, config, split=split, data_dir=data_dir)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not len(source):
        raise ValueError(f"{where} holds no rows")
    for number, values in enumerate(source, start=1):
        yield f"{where}, row {number}", without_nulls(values)


def _is_saved(name: str) -> bool:
    marks = ("dataset_dict.json", "state.json")
    return any((Path(name) / mark).is_file() for mark in marks)


def _saved_split(saved: Any, split: str | None) -> Any:
    if not isinstance(saved, Mapping):
        if split is not None:
            raise ValueError("this folder holds one data set without splits; leave split out")
        return saved
    if split not in saved:
        raise ValueError(f"split is {split!r}; the folder has {', '.join(saved)}")
    return saved[split]
