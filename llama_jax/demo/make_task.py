"""Writes train.jsonl and heldout.jsonl, the rows the demo trains on and is scored by.

A row is a chat: the system line names the task, the user sends one sentence, the assistant
answers with one JSON record on one line. The record has a fixed set of keys in a fixed
order for each kind of sentence, numbers as digits however they were written, and null for
what the sentence does not say, so an answer is either exactly right or wrong.

    python -m llama_jax.demo.make_task

writes the same bytes every time. Nouns and cities of the held-out rows are partly ones that
no training row has; no held-out sentence is a training sentence.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

FOLDER = Path(__file__).parent
SEED = 20240229
NUM_TRAIN = 360
NUM_HELDOUT = 40

SYSTEM = "Turn the sentence into a JSON record."

NUMBERS = (
    ("two", 2),
    ("three", 3),
    ("four", 4),
    ("five", 5),
    ("six", 6),
    ("seven", 7),
    ("eight", 8),
    ("nine", 9),
    ("ten", 10),
    ("twelve", 12),
    ("a dozen", 12),
    ("15", 15),
    ("20", 20),
    ("30", 30),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Words:
    """The open word lists of one split."""

    goods: tuple[str, ...]
    venues: tuple[str, ...]
    cities: tuple[str, ...]


TRAIN_WORDS = Words(
    goods=(
        "lamps",
        "red chairs",
        "coffee cups",
        "garden tools",
        "blue jackets",
        "phone cases",
        "oak tables",
        "wool blankets",
        "travel bags",
        "desk fans",
        "paint brushes",
        "running shoes",
        "green bottles",
        "kitchen knives",
        "cotton shirts",
        "picture frames",
        "bicycle tires",
        "silver spoons",
        "notebooks",
        "umbrellas",
    ),
    venues=(
        "a table",
        "a meeting room",
        "a boat",
        "a cabin",
        "a van",
        "a city tour",
        "a tennis court",
        "a cooking class",
    ),
    cities=(
        "Paris",
        "Oslo",
        "Madrid",
        "Berlin",
        "Chicago",
        "Lima",
        "Tokyo",
        "Cairo",
        "Dublin",
        "Vienna",
        "Boston",
        "Athens",
        "Denver",
        "Prague",
        "Sydney",
        "Toronto",
    ),
)

# Words that no training row has; half of the held-out rows draw from these.
UNSEEN_WORDS = Words(
    goods=("leather belts", "wall clocks", "yellow curtains", "glass bowls", "winter gloves"),
    venues=("a dance studio", "a wine tasting", "a minibus"),
    cities=("Rome", "Seattle", "Helsinki", "Lisbon", "Nairobi"),
)

ORDERS = (
    "Please send {amount} {goods} to our shop in {city}{by_day}.",
    "We would like to order {amount} {goods} for {city}{by_day}.",
    "Our store in {city} needs {amount} {goods}{by_day}.",
    "Can you deliver {amount} {goods} to {city}{by_day}?",
    "I want to buy {amount} {goods}, delivered to {city}{by_day}.",
)
BOOKINGS = (
    "Please book {venue} for {amount} people in {city}{on_day}.",
    "We are {amount} guests and want {venue} in {city}{on_day}.",
    "Could you reserve {venue} in {city} for {amount} of us{on_day}?",
    "Is there {venue} free in {city}{on_day} for {amount} people?",
)
RETURNS = (
    "I am sending back {amount} {goods} because they arrived {fault}.",
    "The {amount} {goods} came {fault}, so I return them.",
    "Sorry, but all {amount} {goods} were {fault} and must go back.",
    "Please take back {amount} {goods}: they are {fault}.",
)
FAULTS = ("broken", "late", "wet", "too small", "too big", "dirty")

Row = dict[str, list[dict[str, str]]]
Option = TypeVar("Option")


def _pick(rng: random.Random, options: Sequence[Option]) -> Option:
    # random() is the one method whose sequence Python promises to keep between versions.
    return options[int(rng.random() * len(options))]


def _sentence_and_record(rng: random.Random, words: Words) -> tuple[str, dict[str, object]]:
    kind = _pick(rng, ("order", "order", "booking", "booking", "return"))
    amount, number = _pick(rng, NUMBERS)
    day = _pick(rng, DAYS) if rng.random() < 0.6 else None
    city = _pick(rng, words.cities)
    if kind == "booking":
        venue = _pick(rng, words.venues)
        sentence = _pick(rng, BOOKINGS).format(
            venue=venue, amount=amount, city=city, on_day=f" on {day}" if day else ""
        )
        what = venue.removeprefix("a ")
        return sentence, {
            "type": kind,
            "what": what,
            "people": number,
            "city": city,
            "day": day,
        }
    goods = _pick(rng, words.goods)
    if kind == "order":
        sentence = _pick(rng, ORDERS).format(
            goods=goods, amount=amount, city=city, by_day=f" by {day}" if day else ""
        )
        return sentence, {
            "type": kind,
            "item": goods,
            "quantity": number,
            "city": city,
            "day": day,
        }
    fault = _pick(rng, FAULTS)
    sentence = _pick(rng, RETURNS).format(goods=goods, amount=amount, fault=fault)
    return sentence, {"type": kind, "item": goods, "quantity": number, "reason": fault}


def _row(sentence: str, record: dict[str, object]) -> Row:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": sentence},
            {"role": "assistant", "content": json.dumps(record)},
        ]
    }


def _rows(seed: int, word_lists: Sequence[Words], taken: set[str]) -> Iterator[Row]:
    """Rows without end, taking turns with the word lists; adds its sentences to `taken`."""
    rng = random.Random(seed)
    turn = 0
    while True:
        sentence, record = _sentence_and_record(rng, word_lists[turn % len(word_lists)])
        if sentence not in taken:
            taken.add(sentence)
            turn += 1
            yield _row(sentence, record)


def make_rows() -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out rows."""
    taken: set[str] = set()
    train = _rows(SEED, [TRAIN_WORDS], taken)
    train_rows = [next(train) for _ in range(NUM_TRAIN)]
    heldout = _rows(SEED + 1, [TRAIN_WORDS, UNSEEN_WORDS], taken)
    return train_rows, [next(heldout) for _ in range(NUM_HELDOUT)]


def to_bytes(rows: Sequence[Row]) -> bytes:
    """JSON lines, UTF-8, one line feed after each row on every system."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def main() -> None:
    train, heldout = make_rows()
    (FOLDER / "train.jsonl").write_bytes(to_bytes(train))
    (FOLDER / "heldout.jsonl").write_bytes(to_bytes(heldout))


if __name__ == "__main__":
    main()
