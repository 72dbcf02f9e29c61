"""The shipped rows are what the generator writes, and the splits are honest."""

import json
from collections.abc import Iterable

import pytest

from llama_jax.demo import make_task

KEYS = {
    "order": ["type", "item", "quantity", "city", "day"],
    "booking": ["type", "what", "people", "city", "day"],
    "return": ["type", "item", "quantity", "reason"],
}


def sentences(rows: Iterable[make_task.Row]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


def records(rows: Iterable[make_task.Row]) -> list[dict[str, object]]:
    return [json.loads(row["messages"][2]["content"]) for row in rows]


def test_the_committed_files_are_the_generators_bytes() -> None:
    train, heldout = make_task.make_rows()
    assert (make_task.FOLDER / "train.jsonl").read_bytes() == make_task.to_bytes(train)
    assert (make_task.FOLDER / "heldout.jsonl").read_bytes() == make_task.to_bytes(heldout)


def test_no_sentence_occurs_twice_and_none_in_both_splits() -> None:
    train, heldout = make_task.make_rows()
    assert len(train) == make_task.NUM_TRAIN
    assert len(heldout) == make_task.NUM_HELDOUT
    every = sentences(train) + sentences(heldout)
    assert len(set(every)) == len(every)


def test_half_of_the_heldout_rows_use_words_no_training_row_has() -> None:
    train, heldout = make_task.make_rows()
    seen = " ".join(sentences(train))
    unseen = [
        *make_task.UNSEEN_WORDS.goods,
        *make_task.UNSEEN_WORDS.venues,
        *make_task.UNSEEN_WORDS.cities,
    ]
    assert not [word for word in unseen if word in seen]
    with_unseen = [s for s in sentences(heldout) if any(word in s for word in unseen)]
    assert len(with_unseen) == make_task.NUM_HELDOUT // 2


@pytest.mark.parametrize("split", [0, 1])
def test_every_record_is_stated_by_its_sentence(split: int) -> None:
    rows = make_task.make_rows()[split]
    numbers = dict(make_task.NUMBERS)
    kinds = set()
    for sentence, record in zip(sentences(rows), records(rows), strict=True):
        kinds.add(record["type"])
        assert list(record) == KEYS[str(record["type"])]
        number = record.get("quantity", record.get("people"))
        assert any(word in sentence for word, value in numbers.items() if value == number)
        for key in ("item", "what", "city", "reason", "day"):
            if record.get(key) is not None:
                assert str(record[key]) in sentence
        if record.get("day", "absent") is None:
            assert not any(day in sentence for day in make_task.DAYS)
    assert kinds == set(KEYS)


def test_rows_stay_short() -> None:
    # The demo trains at a sequence length of 96 tokens; English and JSON take some three
    # characters a token, and the template's marks take the rest.
    train, heldout = make_task.make_rows()
    for row in (*train, *heldout):
        assert sum(len(message["content"]) for message in row["messages"]) <= 230
