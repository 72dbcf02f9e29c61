"""Sources: every kind of file and library gives the same rows, and names a bad one."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import sys

import fsspec
import numpy as np
import pyarrow
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from train.data.files import find_files, package_path
from train.data.sources import read_rows, source_name
from train.sections.data import SourceSection

MESSAGES = [{"role": "user", "content": "ü"}, {"role": "assistant", "content": "a"}]
CHATS = [{"messages": MESSAGES}, {"messages": MESSAGES[1:]}]
TEXTS = [{"text": 'one, "two"\nthree'}, {"text": "ü"}]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def values_of(*entries) -> list[dict]:
    return [row.values for row in read_rows(entries)]


def places_of(*entries) -> list[str]:
    return [row.where for row in read_rows(entries)]


def test_rows_come_in_order_with_kind_and_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"text": "a\u2028b"}\n\n'
        '{"instruction": "i", "input": "", "output": "o"}\n'
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    )
    rows = list(read_rows([str(path)]))
    assert [row.kind for row in rows] == ["text", "instruction", "chat"]
    assert [row.where for row in rows] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert rows[0].values == {"text": "a\u2028b"}


@pytest.mark.parametrize("name", ["a::b.jsonl", "br[1].jsonl", "star*.jsonl", "hash#%20 ü.jsonl"])
def test_a_local_file_is_found_whatever_signs_are_in_its_name(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(lines(TEXTS))
    monkeypatch.chdir(tmp_path)
    assert values_of(str(tmp_path / name)) == values_of(name) == TEXTS


def test_a_pipe_is_no_file_of_rows(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl is no regular file; rows are read twice"):
        values_of(str(tmp_path / "rows.jsonl"))


def test_files_must_exist_be_files_and_hold_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        list(read_rows([str(tmp_path / "nothing.jsonl")]))
    with pytest.raises(FileNotFoundError, match=r"part-\*\.jsonl"):
        list(read_rows([str(tmp_path / "part-*.jsonl")]))
    with pytest.raises(ValueError, match="is a folder; name its files"):
        list(read_rows([str(tmp_path)]))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match=r"rows.txt ends in '.txt'; files of rows end in .jsonl"):
        list(read_rows([str(tmp_path / "rows.txt")]))
    for name, content in (("empty.jsonl", "\n"), ("empty.csv", "text\n"), ("empty.json", "[]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} holds no rows"):
            list(read_rows([str(tmp_path / name)]))


def test_other_encodings_are_named(tmp_path):
    for ending, rows in ((".jsonl", lines(TEXTS).decode()), (".json", json.dumps(TEXTS))):
        path = tmp_path / f"rows{ending}"
        path.write_bytes(rows.encode("utf-16"))
        with pytest.raises(ValueError, match=f"{path}, line 1: not a JSON object: no UTF-8"):
            list(read_rows([str(path)]))
        path.write_bytes(codecs.BOM_UTF8 + rows.encode())
        assert values_of(str(path)) == TEXTS


def test_an_empty_name_is_no_folder():
    with pytest.raises(ValueError, match="the name of the data file is empty"):
        list(read_rows([" "]))


def test_shipped_rows_are_found_by_their_package_name():
    _, (path,) = find_files("package:demo/train.jsonl")
    assert path == str(package_path("package:demo/train.jsonl"))
    assert values_of("package:demo/train.jsonl")[0]["messages"]


def test_json_arrays_and_lines_under_the_same_ending(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n " + json.dumps(CHATS))
    assert values_of(str(path)) == CHATS
    assert places_of(str(path))[1] == f"{path}, row 2"
    path.write_bytes(lines(CHATS))
    assert values_of(str(path)) == CHATS
    for rows in (json.dumps(CHATS).encode(), lines(CHATS)):
        path.write_bytes(codecs.BOM_UTF8 + rows)
        assert values_of(str(path)) == CHATS
    path.write_text('[{"text": "a"}, 3]')
    with pytest.raises(ValueError, match=r"rows.json, row 2: a row is a JSON object, not int"):
        values_of(str(path))


@pytest.mark.parametrize("compress", [(".gz", gzip.compress), (".bz2", bz2.compress)])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_what_unpacks_without_end_is_refused(tmp_path, monkeypatch, kind, compress):  # R117
    monkeypatch.setattr("train.data.unpacking.FREE_BYTES", 10_000)
    ending, pack = compress
    path = tmp_path / f"rows{kind}{ending}"
    row = b'text\n"' if kind == ".csv" else b'{"text": "'
    path.write_bytes(pack(row + bytes(20_000_000)))
    with pytest.raises(ValueError, match=f"rows{kind}{ending} unpacks to over 200 times its"):
        values_of(str(path))


COMPRESSIONS = [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]


@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS)
def test_compressed_files(tmp_path, ending, compress):
    path = tmp_path / f"rows.jsonl{ending}"
    packed = compress(lines(TEXTS))
    several = [compress(lines([row])) for row in TEXTS]
    for whole in (packed, b"".join(several), compress(b"") + packed, packed + bytes(8)):
        path.write_bytes(whole)
        assert values_of(str(path)) == TEXTS
    for damaged in (
        packed[:-12],
        packed[:20] + b"damage" + packed[26:],
        several[0] + b"damage" + several[1][6:],
        several[0] + several[1][:-12],
        packed + b"more",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"rows.jsonl{ending} is damaged"):
            values_of(str(path))


@pytest.mark.parametrize(("ending", "compress"), COMPRESSIONS)
def test_compressed_parquet(tmp_path, ending, compress):
    path = tmp_path / f"rows.parquet{ending}"
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(CHATS), file)
    path.write_bytes(compress(file.getvalue()))
    assert values_of(str(path)) == CHATS


def test_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match=r"rows.csv: the column 'text' appears twice"):
        values_of(str(path))
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(ValueError, match=r"rows.parquet: the column 'text' appears twice"):
        values_of(str(path))


def test_a_file_that_is_not_compressed_as_it_says_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(lines(TEXTS))
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is damaged or not what its ending says"):
        values_of(str(path))


def test_csv_with_quotes_line_feeds_and_long_cells(tmp_path):
    path = tmp_path / "rows.csv"
    long = "x" * 200_000
    path.write_text(f'\ufefftext\n"one, ""two""\nthree"\nü\n{long}\n', encoding="utf-8")
    assert values_of(str(path)) == [*TEXTS, {"text": long}]
    path.write_text('messages\n"' + json.dumps(MESSAGES).replace('"', '""') + '"\n')
    assert values_of(str(path)) == CHATS[:1]
    path.write_text("instruction,output\na,b\nc\n")
    with pytest.raises(ValueError, match=r"rows.csv, row 2: the row has not as many cells"):
        values_of(str(path))
    path.write_text("instruction,output\na,b,c\n")
    with pytest.raises(ValueError, match=r"rows.csv, row 1: the row has not as many cells"):
        values_of(str(path))
    path.write_bytes(b"text\n\xff\n")
    with pytest.raises(ValueError, match=r"rows.csv.*not CSV in UTF-8"):
        values_of(str(path))


def test_parquet_with_lists_nulls_and_damage(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(CHATS), path)
    assert values_of(str(path)) == CHATS
    mixed = [
        {"instruction": "i", "input": None, "output": "o"},
        {"instruction": "i", "input": "x", "output": "o"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(mixed), path)
    assert values_of(str(path)) == [{"instruction": "i", "output": "o"}, mixed[1]]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), path)
    with pytest.raises(ValueError, match=r"rows.parquet, row 2: text must be a string"):
        values_of(str(path))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"rows.parquet is not a readable Parquet file"):
        values_of(str(path))


@pytest.mark.parametrize("kind", [pyarrow.timestamp("us"), pyarrow.string()])
def test_parquet_with_values_that_python_does_not_hold(tmp_path, kind):
    """A day after the year 9999, and bytes that are no UTF-8, in a column beside the text."""
    column = pyarrow.array([2**60], pyarrow.timestamp("us"))
    if kind == pyarrow.string():
        ends = pyarrow.py_buffer(np.array([0, 1], np.int32))
        column = pyarrow.Array.from_buffers(kind, 1, [None, ends, pyarrow.py_buffer(b"\xff")])
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "odd": column}), path)
    with pytest.raises(ValueError, match=r"rows\.parquet, rows 1 to 1: a value is no text in"):
        list(read_rows([str(path)]))


def test_globs_are_read_in_the_order_of_names(tmp_path):
    for number in (2, 1):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines([{"text": str(number)}]))
    (tmp_path / "odd[1].jsonl").write_bytes(lines([{"text": "odd"}]))
    assert values_of(str(tmp_path / "part-*.jsonl")) == [{"text": "1"}, {"text": "2"}]
    assert places_of(str(tmp_path / "part-*.jsonl"))[0].endswith("part-1.jsonl, line 1")
    assert values_of(str(tmp_path / "odd[1].jsonl")) == [{"text": "odd"}], "a name, not a pattern"


def test_urls_are_read_through_fsspec():
    memory = fsspec.filesystem("memory")
    for number in (1, 2):
        memory.pipe(f"/rows/part-{number}.jsonl.gz", gzip.compress(lines([{"text": str(number)}])))
    try:
        assert values_of("memory://rows/part-*.jsonl.gz") == [{"text": "1"}, {"text": "2"}]
        assert places_of("memory://rows/part-1.jsonl.gz") == [
            "memory://rows/part-1.jsonl.gz, line 1"
        ]
    finally:
        memory.rm("/rows", recursive=True)
    with pytest.raises(ValueError, match="nosuch://a.jsonl: Protocol not known"):
        values_of("nosuch://a.jsonl")


def write_array_record(path, records) -> str:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def test_array_record(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", [json.dumps(r).encode() for r in CHATS])
    section = SourceSection(array_record=path)
    assert values_of(section) == CHATS
    assert places_of(section)[1] == f"{path}, row 2"
    assert source_name(section) == f"array_record {path}"
    write_array_record(tmp_path / "b.array_record", [b"\xff"])
    with pytest.raises(ValueError, match=r"b.array_record, row 1: not a JSON object"):
        values_of(SourceSection(array_record=str(tmp_path / "*.array_record")))
    (tmp_path / "c.array_record").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"c.array_record is not a readable ArrayRecord file"):
        values_of(SourceSection(array_record=str(tmp_path / "c.array_record")))
    with pytest.raises(ValueError, match="reads local files only"):
        values_of(SourceSection(array_record="gs://bucket/a.array_record"))


def test_columns_choose_and_rename(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("article,author\nA,x\n")
    assert values_of(SourceSection(path=str(path), columns={"text": "article"})) == [{"text": "A"}]
    with pytest.raises(ValueError, match=r"row 1: the row has the keys article, author"):
        values_of(str(path))
    with pytest.raises(ValueError, match=r"columns names 'body', but the row has article, author"):
        values_of(SourceSection(path=str(path), columns={"text": "body"}))
    with pytest.raises(ValueError, match="has no key 'title'"):
        values_of(SourceSection(path=str(path), columns={"text": "article", "title": "author"}))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_text_in_a_column_of_messages_is_told_with_the_column(tmp_path, ending):
    path, said = tmp_path / f"chats.{ending}", '[{"role": "user", "content": "hi"}]'
    quoted = said.replace('"', '""')
    path.write_text(f'talk\n"{quoted}"\n' if ending == "csv" else json.dumps({"talk": said}) + "\n")
    where = f"{path}, {'row' if ending == 'csv' else 'line'} 1: messages must be a list with at"
    with pytest.raises(ValueError, match=re.escape(where)) as raised:
        values_of(SourceSection(path=str(path), columns={"messages": "talk"}))
    assert "only under a CSV header messages" in str(raised.value)
    assert str(raised.value).endswith("(columns reads messages from 'talk')")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    from tests.train.data.tfds_rows import TfdsRows

    folder = tmp_path_factory.mktemp("tfds")
    TfdsRows(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


@pytest.mark.filterwarnings("ignore")  # of TFDS about its own parts
def test_tfds_without_tensorflow(tfds_dir):
    section = SourceSection(
        tfds="tfds_rows", split="train", data_dir=tfds_dir, columns={"messages": "messages"}
    )
    found = values_of(section)
    assert len(found) == 3
    assert {row["messages"][0]["content"] for row in found} == {f"frage {n} ü" for n in range(3)}
    assert found[0]["messages"][1]["role"] == "assistant"
    assert places_of(section)[0] == "tfds tfds_rows[train], row 1"
    assert source_name(section) == "tfds tfds_rows[train]"
    assert len(values_of(section.replace(split="test"))) == 1
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"row 1: a chat row has no key 'note'"):
        values_of(section.replace(columns=None))
    with pytest.raises(ValueError, match=r"tfds nothing\[train\]: .*download_and_prepare"):
        values_of(section.replace(tfds="nothing"))
    with pytest.raises(ValueError, match=r"tfds tfds_rows\[validation\]"):
        values_of(section.replace(split="validation"))


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(CHATS), "test": datasets.Dataset.from_list(CHATS[:1])}
    ).save_to_disk(str(tmp_path / "both"))
    section = SourceSection(datasets=str(tmp_path / "both"), split="train")
    assert values_of(section) == CHATS
    assert len(values_of(section.replace(split="test"))) == 1
    with pytest.raises(ValueError, match=r"split is 'dev'; the folder has train, test"):
        values_of(section.replace(split="dev"))
    datasets.Dataset.from_list(TEXTS).save_to_disk(str(tmp_path / "one"))
    one = SourceSection(datasets=str(tmp_path / "one"))
    assert values_of(one) == TEXTS
    assert places_of(one)[1] == f"datasets {tmp_path / 'one'}, row 2"
    with pytest.raises(ValueError, match="leave split out"):
        values_of(one.replace(split="train"))
    for field in ("config", "data_dir"):
        with pytest.raises(ValueError, match=f"one.*{field} is 'x', .* leave {field} out"):
            values_of(one.replace(**{field: "x"}))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(lines(TEXTS))
    with pytest.raises(ValueError, match="say which in split"):
        values_of(SourceSection(datasets=str(tmp_path / "files")))


@pytest.mark.parametrize(
    ("library", "section"),
    [
        ("tensorflow_datasets", {"tfds": "x", "split": "train"}),
        ("datasets", {"datasets": "x", "split": "train"}),
        ("pyarrow", {"path": "x.parquet"}),
    ],
)
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, library, section):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install 'llama-jax\[data\]'"):
        values_of(SourceSection(**section))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "names nothing to read; give exactly one of path, tfds"),
        ({"path": "a", "tfds": "b"}, "names path and tfds"),
        ({"path": "a", "split": "train"}, "split of a data source is set, but path"),
        ({"tfds": "a", "split": "train", "config": "c"}, "config of a data source is set"),
        ({"tfds": "a"}, "tfds a needs a split"),
        ({"path": "a", "columns": {}}, "columns of a data source is empty"),
        ({"path": "a", "weight": 0.0}, "weight is 0.0; it must be above"),
    ],
)
def test_sections_that_say_too_much_or_too_little(section, message):
    with pytest.raises(ValueError, match=message):
        SourceSection(**section)
