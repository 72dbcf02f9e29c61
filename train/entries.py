"""Files of JSON lines that a run writes step by step, read back."""

from pathlib import Path
from typing import Any

from llama_jax.formats.json_fields import parse_json, read_text


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of the file, each with its `step`; none where there is no file. A last line that
    a crash cut off is left out.

    Raises ValueError naming the file and the line for anything else.
    """
    if not path.is_file():
        return []
    entries = []
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            if number == len(lines):  # no line feed after it
                break
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise ValueError(f"{where}: an entry is an object with its step, not {line[:80]}")
        entries.append(entry)
    return entries
