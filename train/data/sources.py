"""Where rows come from: the sources a run config names, read one after another."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from train.data.files import Values, read_files
from train.data.records import read_array_record, read_datasets, read_tfds
from train.data.rows import Row, check_row
from train.sections.data import SourceSection

Entry = str | SourceSection


def read_rows(entries: Iterable[Entry]) -> Iterator[Row]:
    """The checked rows of the sources in order.

    Raises ValueError naming source and row, FileNotFoundError for a file that is not there.
    """
    for entry in entries:
        yield from read_source(entry)


def read_source(entry: Entry) -> Iterator[Row]:
    """The checked rows of one source: a path, or a section that says more."""
    section = SourceSection(path=entry) if isinstance(entry, str) else entry
    for where, values in _values(section):
        if section.columns is None:
            yield check_row(values, where)
            continue
        try:
            yield check_row(_renamed(values, section.columns, where), where)
        except ValueError as error:
            read = ", ".join(f"{field} from {col!r}" for field, col in section.columns.items())
            raise ValueError(f"{error} (columns reads {read})") from error


def source_name(entry: Entry) -> str:
    """How reports call a source."""
    if isinstance(entry, str):
        return entry
    kind, name = entry.place()
    shown = name if kind == "path" else f"{kind} {name}"
    return shown if entry.split is None else f"{shown}[{entry.split}]"


def _values(section: SourceSection) -> Iterator[Values]:
    kind, name = section.place()
    if kind == "path":
        return read_files(name)
    if kind == "array_record":
        return read_array_record(name)
    if kind == "tfds":
        assert section.split is not None
        return read_tfds(name, split=section.split, data_dir=section.data_dir)
    return read_datasets(
        name, split=section.split, config=section.config, data_dir=section.data_dir
    )


def _renamed(values: Any, columns: Mapping[str, str], where: str) -> Any:
    """The row's fields from the columns named for them; the other columns are left unread."""
    if not isinstance(values, dict):
        return values  # check_row says what it should have been
    missing = [column for column in columns.values() if column not in values]
    if missing:
        raise ValueError(
            f"{where}: columns names {missing[0]!r}, but the row has {', '.join(values)}"
        )
    return {field: values[column] for field, column in columns.items()}
