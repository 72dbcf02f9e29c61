"""Rows to samples: what is trained, what is cut, and that everything left out is counted."""

import numpy as np
import pytest

from tests.train.tiny_data import byte_tokenizer, chat_row
from train.data.render import PROMPT_WITH_INPUT, render, render_rows
from train.data.report import DataReport, colored, spans
from train.data.rows import Row, check_row
from train.data.samples import Sample
from train.sections.data import DataSection

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_ids[0]


def row(values: dict) -> Row:
    return check_row(values, "rows.jsonl, line 1")


class Plain:
    """The byte tokenizer as that of a base model: no template, a begin token before text."""

    chat_templates = ()
    bos_token_id = 300
    eos_token_ids = (END,)
    adds_bos = True

    def encode_plain(self, text):
        return TOKENIZER.encode_plain(text)

    def wrap(self, ids):
        return [300, *ids]


def rendered(rows, length, *, train_all=False, **options):
    report = DataReport()
    section = DataSection(train=("x",), **options)
    found = list(
        render_rows(
            rows, TOKENIZER, section, sequence_length=length, train_all=train_all, report=report
        )
    )
    return found, report


def trained_text(sample: Sample) -> list[str]:
    return [text for text, trained in spans(sample, TOKENIZER) if trained]


def test_r35_only_answers_and_their_terminators_are_trained():
    messages = [
        {"role": "system", "content": "A1"},
        {"role": "user", "content": "A2"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "A1"},
        {"role": "assistant", "content": "A2"},
    ]
    found, report = rendered([row({"messages": messages})], 200)
    assert trained_text(found[0]) == ["A1<|im_end|>", "A2<|im_end|>"]
    assert report.trained_tokens == 6
    assert "of which 6 are trained" in report.lines("train")[0]


def test_text_rows_get_an_end_token_and_are_trained_whole():
    sample = render(row({"text": "hi"}), TOKENIZER)
    assert sample.ids.tolist() == [*TOKENIZER.encode_plain("hi"), END]
    assert sample.mask.tolist() == [1, 1, 1]
    plain = render(row({"text": "hi <|im_end|>"}), Plain())
    assert plain.ids[0] == 300 and plain.ids.tolist().count(END) == 1, "text makes no control token"


def test_instruction_rows_are_a_chat_where_there_is_a_template():
    both = render(row({"instruction": "Do", "input": "x", "output": "y"}), TOKENIZER)
    chat = render(row(chat_row("Do\n\nx", "y")), TOKENIZER)
    np.testing.assert_array_equal(both.ids, chat.ids)
    np.testing.assert_array_equal(both.mask, chat.mask)


def test_instruction_rows_have_a_form_where_there_is_no_template():
    sample = render(row({"instruction": "Do", "input": "x", "output": "y"}), Plain())
    prompt = TOKENIZER.encode_plain(PROMPT_WITH_INPUT.format(instruction="Do", input="x"))
    assert sample.ids.tolist() == [300, *prompt, *TOKENIZER.encode_plain("y"), END]
    assert sample.mask.tolist() == [0] * (len(prompt) + 1) + [1, 1]
    short = render(row({"instruction": "Do", "output": "y"}), Plain())
    assert "Input" not in TOKENIZER.decode(short.ids[1:].tolist())


def test_a_tokenizer_without_an_end_token_is_refused():
    class Endless(Plain):
        eos_token_ids = ()

    with pytest.raises(ValueError, match="rows.jsonl, line 1: the tokenizer has no end token"):
        render(row({"text": "hi"}), Endless())


def test_pretraining_counts_every_token():
    found, _ = rendered([row(chat_row("q", "a"))], 100, train_all=True)
    assert found[0].mask.all()


def long_prompt():
    """A prompt of about 30 tokens and an answer of 5."""
    return row(chat_row("q" * 5, "abcd"))


def test_r36_an_answer_that_would_be_cut_away_is_dropped_and_counted():
    whole = render(long_prompt(), TOKENIZER)
    assert whole.mask.sum() == 5
    length = len(whole.ids) - 8
    for policy in ("drop", "cut"):
        found, report = rendered([long_prompt()], length, long_rows=policy)
        assert found == [] and report.samples == 0
        assert sum(report.dropped.values()) == 1
        assert any("1 left out" in line for line in report.lines("train"))
    with pytest.raises(
        ValueError, match=f"rows.jsonl, line 1: the row has {len(whole.ids)} tokens"
    ):
        rendered([long_prompt()], length, long_rows="refuse")


def test_cutting_keeps_the_start_of_an_answer_and_counts_it():
    whole = render(long_prompt(), TOKENIZER)
    found, report = rendered([long_prompt()], len(whole.ids) - 3, long_rows="cut")
    np.testing.assert_array_equal(found[0].ids, whole.ids[:-3])
    assert (report.cut, report.samples, dict(report.dropped)) == (1, 1, {})
    assert "1 rows cut off" in report.lines("train")[-1]


def test_long_texts_are_split_so_that_every_token_is_predicted_once():
    text = "abcdefghij" * 3
    whole = render(row({"text": text}), TOKENIZER)
    found, report = rendered([row({"text": text})], 8)
    assert all(len(piece.ids) <= 8 for piece in found)
    predicted = np.concatenate([piece.ids[1:] for piece in found])
    np.testing.assert_array_equal(predicted, whole.ids[1:])
    assert report.split == 1 and report.trained_tokens == len(whole.ids) - 1
    for policy, samples in (("drop", 0), ("cut", 1)):
        assert len(rendered([row({"text": text})], 8, long_texts=policy)[0]) == samples
    with pytest.raises(ValueError, match="sequence_length is 8"):
        rendered([row({"text": text})], 8, long_texts="refuse")


def test_the_report_is_a_count_of_what_happened():
    rows = [long_prompt(), row({"text": "ab"}), row({"text": "x" * 100})]
    _, report = rendered(rows, 40, long_texts="drop")
    counts = report.to_dict()
    assert counts["rows"] == 3 and counts["samples"] == 2
    assert counts["dropped"] == {"longer than sequence_length": 1}
    assert counts["longest_sample_tokens"] == len(render(long_prompt(), TOKENIZER).ids)
    assert counts["tokens"] == counts["longest_sample_tokens"] + 3


def test_a_sample_is_shown_with_its_trained_text_marked():
    sample = render(row(chat_row("q", "yes")), TOKENIZER)
    assert colored(sample, TOKENIZER, ansi=False).endswith("assistant\n【yes<|im_end|>】\n")
    assert "\x1b[32myes<|im_end|>\x1b[0m" in colored(sample, TOKENIZER, ansi=True)
