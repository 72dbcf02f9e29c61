"""The shipped preference rows are what their script writes, and say what they should."""

import json

import pytest

from llama_jax.demo import make_preferences
from llama_jax.demo.make_task import FOLDER, make_rows
from train.data.rows import check_row


def test_the_shipped_file_is_what_the_script_writes():
    shipped = (FOLDER / "preferences.jsonl").read_bytes()
    assert shipped == make_preferences.to_bytes(make_preferences.make_pairs())
    assert shipped.count(b"\n") == make_preferences.NUM_PAIRS


def test_chosen_answers_are_right_and_rejected_ones_are_not():
    right = {row["messages"][1]["content"]: row["messages"][2]["content"] for row in make_rows()[0]}
    for number, pair in enumerate(make_preferences.make_pairs()):
        assert check_row(pair, "here").kind == "preference"
        assert pair["chosen"] == right[pair["prompt"][-1]["content"]]
        wanted = json.loads(pair["chosen"])
        if number % 4 == 3:
            assert json.loads(pair["rejected"]).items() < wanted.items()
        else:
            with pytest.raises(ValueError):
                json.loads(pair["rejected"])
