"""Rows: what is one, and that a bad one names its file and line."""

import json

import pytest

from train.data.sources import package_path, parse_row, read_rows, resolve


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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "a row is a JSON object, not list"),
        ('{"prompt": "p"}', "the keys prompt; it must have exactly one of messages"),
        ("{}", r"\(none\)"),
        ('{"text": "t", "messages": []}', "messages and text"),
        ('{"text": "t", "label": 1}', "text row has no key 'label'"),
        ('{"text": ""}', "text is empty"),
        ('{"text": 3}', "text must be a string, not 3"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ('{"instruction": "i"}', "needs the key output"),
        ('{"instruction": "i", "output": ""}', "output is empty"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] must be"),
        ('{"messages": [{"role": "robot", "content": ""}]}', "role is 'robot'; allowed are system"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\].content"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "no assistant turn"),
    ],
)
def test_bad_rows_say_what_is_wrong_and_where(row, message):
    with pytest.raises(ValueError, match=f"rows.jsonl, line 7: .*{message}"):
        parse_row(row, "rows.jsonl, line 7")


def test_files_must_exist_and_hold_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        list(read_rows([str(tmp_path / "nothing.jsonl")]))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        list(read_rows([str(empty)]))


def test_shipped_rows_are_found_by_their_package_name():
    path = resolve("package:demo/train.jsonl")
    assert path == package_path("package:demo/train.jsonl")
    assert json.loads(path.read_text().splitlines()[0])["messages"]
