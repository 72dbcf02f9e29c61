"""Rows: what is one, and that a bad one is named."""

import pytest

from train.data.rows import Row, check_row, parse_json


def read(line: str | bytes, where: str) -> Row:
    return check_row(parse_json(line, where), where)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a JSON object"),
        (b'{"text": "\xff"}', "not a JSON object"),
        ("[1]", "a row is a JSON object, not list"),
        ('{"response": "p"}', "the keys response; it must have exactly one of messages"),
        ("{}", r"\(none\)"),
        ('{"text": "t", "messages": []}', "messages and text"),
        ('{"text": "t", "prompt": "p"}', "prompt and text"),
        ('{"text": "t", "label": 1}', "text row has no key 'label'.*columns"),
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
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"},'
            ' {"role": "assistant", "content": ""}]}',
            r"messages\[2\].content is empty, so there is nothing to learn",
        ),
        ('{"text": "a", "text": "b"}', "'text' appears twice"),
        ('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', "'role' appears"),
        ('{"prompt": "p", "chosen": "c"}', "needs the key rejected"),
        ('{"prompt": "p", "chosen": "c", "rejected": ""}', "rejected is empty"),
        ('{"prompt": 1, "chosen": "c", "rejected": "r"}', "prompt must be a string or a list"),
        ('{"prompt": [], "chosen": "c", "rejected": "r"}', "prompt must be a list with at least"),
        (
            '{"prompt": [{"role": "assistant", "content": "a"}], "chosen": "c", "rejected": "r"}',
            "prompt ends with an assistant's turn",
        ),
        (
            '{"prompt": "p", "chosen": [{"role": "user", "content": "c"}], "rejected": "r"}',
            "chosen must be a string or one assistant message",
        ),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "score": 1}', "has no key 'score'"),
    ],
)
def test_bad_rows_say_what_is_wrong_and_where(row, message):
    with pytest.raises(ValueError, match=f"rows.jsonl, line 7: .*{message}"):
        read(row, "rows.jsonl, line 7")


def test_the_kinds_of_rows():
    chat = '{"messages": [{"role": "assistant", "content": "a"}]}'
    rows = {
        "text": '{"text": "t"}',
        "instruction": '{"instruction": "i", "input": "", "output": "o"}',
        "chat": chat,
        "preference": '{"prompt": "p", "chosen": "c", "rejected": "r"}',
    }
    assert [read(text, "here").kind for text in rows.values()] == list(rows)


def test_an_answer_may_be_a_list_of_one_message():
    row = read(
        '{"prompt": [{"role": "user", "content": "p"}],'
        ' "chosen": [{"role": "assistant", "content": "c"}], "rejected": "r"}',
        "here",
    )
    assert row.values["chosen"] == "c" and row.values["rejected"] == "r"
    assert row.values["prompt"] == [{"role": "user", "content": "p"}]
