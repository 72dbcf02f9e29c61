"""Writes `preferences.jsonl`: the demo's records, preferred to answers that no program can read.

The sentences and records are those of the demo's training rows. What is rejected is the same
content in a form that a JSON parser refuses, or a record that lacks its last field.
"""

import json
from pathlib import Path
from typing import Any

from llama_jax.demo.make_task import FOLDER, make_rows

NUM_PAIRS = 96


def spoilt(number: int, answer: str) -> str:
    """The answer in one of four worse forms, taking turns."""
    record = json.loads(answer)
    if number % 4 == 0:
        return f"Sure! Here is the record: {answer}"
    if number % 4 == 1:
        return str(record)  # Python's quotes are not JSON's
    if number % 4 == 2:
        return ", ".join(f"{key} is {value}" for key, value in record.items())
    return json.dumps(dict(list(record.items())[:-1]))


def make_pairs() -> list[dict[str, Any]]:
    """Preference rows, whose prompt is the system's turn and the user's."""
    pairs = []
    for number, row in enumerate(make_rows()[0][:NUM_PAIRS]):
        *prompt, answer = row["messages"]
        chosen = answer["content"]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": spoilt(number, chosen)})
    return pairs


def to_bytes(pairs: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()


def main() -> None:
    (Path(FOLDER) / "preferences.jsonl").write_bytes(to_bytes(make_pairs()))


if __name__ == "__main__":
    main()
