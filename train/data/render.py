"""From rows to samples: what the model reads, and which of it is trained."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llama_jax.formats.chat_labels import chat_with_labels
from train.data.report import DataReport
from train.data.rows import Row
from train.data.samples import Sample, make_sample
from train.sections.data import DataSection

# For models without a chat template.
PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def render_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    section: DataSection,
    *,
    sequence_length: int,
    train_all: bool,
    report: DataReport,
    limit: str = "train.sequence_length",
    advice: str = "make it longer, shorten the row, or choose drop or cut",
) -> Iterator[Sample]:
    """The samples of the rows, each of at most `sequence_length` tokens and with something to
    learn; of a preference row two, chosen and rejected, or none.

    What is left out or cut is counted in `report`, and raises ValueError when `section.long_rows`
    or `long_texts` say refuse.

    train_all: every token is trained, not only answers. limit: what sets `sequence_length`, and
    advice: what to do about a longer row that is refused.
    """
    too_long = f"{limit} is {sequence_length}; {advice}"
    for row in rows:
        report.rows += 1
        if row.kind == "preference":
            pair = render_pair(row, tokenizer)
            yield from _fit_pair(pair, row, section, sequence_length, report, too_long)
            continue
        sample = render(row, tokenizer)
        if train_all:
            sample = Sample(sample.ids, np.ones_like(sample.mask))
        policy = section.long_texts if row.kind == "text" else section.long_rows
        for piece in _fit(sample, row, policy, sequence_length, report, too_long):
            if piece.mask[1:].any():
                report.add(piece)
                yield piece
            elif len(piece.ids) < len(sample.ids):
                report.drop("no answer left after cutting")
            else:
                report.drop("nothing to learn")


def render(row: Row, tokenizer: Any) -> Sample:
    """One row as token ids and a mask of the trained ones.

    Chat: the tokenizer's template; the assistant's turns with their terminators are trained.
    Instruction: the same as a user's turn and an assistant's where there is a template, else the
    form above; the output with an end token is trained. Text: a begin token where the model wants
    one, the text, an end token; all of it is trained.
    """
    values = row.values
    try:
        if row.kind == "chat":
            return make_sample(*chat_with_labels(tokenizer, values["messages"]))
        if row.kind == "instruction":
            return _render_instruction(values, tokenizer)
        ids = _ended(tokenizer.wrap(tokenizer.encode_plain(values["text"])), tokenizer)
        return make_sample(ids, [1] * len(ids))
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def _render_instruction(values: dict[str, str], tokenizer: Any) -> Sample:
    extra = values.get("input", "")
    if tokenizer.chat_templates:
        question = f"{values['instruction']}\n\n{extra}" if extra else values["instruction"]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": values["output"]},
        ]
        return make_sample(*chat_with_labels(tokenizer, messages))
    form = PROMPT_WITH_INPUT if extra else PROMPT
    text = form.format(instruction=values["instruction"], input=extra)
    prompt = _begun(tokenizer.encode_plain(text), tokenizer)
    return _prompt_and_answer(prompt, values["output"], tokenizer)


def render_pair(row: Row, tokenizer: Any) -> tuple[Sample, Sample]:
    """A preference row as its prompt with the chosen answer and with the rejected one; of both the
    answer with its end is trained.

    Where there is a template, the prompt is its turns before the answer (a string is a user's
    turn); else the prompt stands as it is before the answer.
    """
    prompt = row.values["prompt"]
    try:
        if isinstance(prompt, list) or tokenizer.chat_templates:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chosen, rejected = (
                make_sample(
                    *chat_with_labels(
                        tokenizer,
                        [*turns, {"role": "assistant", "content": row.values[key]}],
                        last_turn_only=True,
                    )
                )
                for key in ("chosen", "rejected")
            )
            return chosen, rejected
        start = _begun(tokenizer.encode_plain(prompt), tokenizer)
        chosen, rejected = (
            _prompt_and_answer(start, row.values[key], tokenizer) for key in ("chosen", "rejected")
        )
        return chosen, rejected
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def _prompt_and_answer(prompt: list[int], answer: str, tokenizer: Any) -> Sample:
    """Tokenized apart, so that the answer's tokens do not depend on the prompt."""
    ids = _ended(tokenizer.encode_plain(answer), tokenizer)
    return make_sample(prompt + ids, [0] * len(prompt) + [1] * len(ids))


def _begun(ids: list[int], tokenizer: Any) -> list[int]:
    return [tokenizer.bos_token_id, *ids] if tokenizer.adds_bos else list(ids)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With exactly one end token; ValueError where the tokenizer has none to teach."""
    ends = tokenizer.eos_token_ids
    if not ends:
        raise ValueError(
            "the tokenizer has no end token, so a model could not learn where to stop; use a "
            "tokenizer whose configuration names eos_token"
        )
    return ids if ids and ids[-1] in ends else [*ids, ends[0]]


def _fit(
    sample: Sample,
    row: Row,
    policy: str,
    sequence_length: int,
    report: DataReport,
    too_long: str,
) -> Iterator[Sample]:
    size = len(sample.ids)
    if size <= sequence_length:
        yield sample
    elif policy == "refuse":
        raise ValueError(f"{row.where}: the row has {size} tokens, but {too_long}")
    elif policy == "drop":
        report.drop("longer than sequence_length")
    elif policy == "cut":
        report.cut += 1
        yield Sample(sample.ids[:sequence_length], sample.mask[:sequence_length])
    else:
        report.split += 1
        # Pieces overlap by one token: the first of a piece is predicted by nothing in it.
        for start in range(0, size - 1, sequence_length - 1):
            part = slice(start, start + sequence_length)
            yield Sample(sample.ids[part], sample.mask[part])


def _fit_pair(
    pair: tuple[Sample, Sample],
    row: Row,
    section: DataSection,
    sequence_length: int,
    report: DataReport,
    too_long: str,
) -> Iterator[Sample]:
    """Both samples, or neither: one alone says nothing about a preference."""
    longest = max(pair, key=lambda sample: len(sample.ids))
    fitted = [longest]
    if len(longest.ids) > sequence_length:
        fitted = list(_fit(longest, row, section.long_rows, sequence_length, report, too_long))
    if not fitted:
        return
    chosen, rejected = (
        Sample(sample.ids[:sequence_length], sample.mask[:sequence_length]) for sample in pair
    )
    if not (chosen.mask[1:].any() and rejected.mask[1:].any()):
        report.drop("no answer left after cutting")
    elif np.array_equal(chosen.ids, rejected.ids):
        report.drop("chosen equals rejected")
    else:
        for sample in (chosen, rejected):
            report.add(sample)
            yield sample
