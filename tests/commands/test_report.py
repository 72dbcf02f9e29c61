"""Where output goes and what it looks like."""

import io
import json
import math

import pytest

from llama_jax.commands.report import Progress, print_table, to_json, to_size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_is_standard_and_one_line() -> None:
    text = to_json({"loss": math.nan, "rows": [math.inf, 1.5, (2, -math.inf)], "name": "é\n"})
    assert json.loads(text) == {"loss": None, "rows": [None, 1.5, [2, None]], "name": "é\n"}
    assert "\n" not in text and "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 * 1024**2, "5.0 MiB"),
        (3 * 2**40, "3072.00 GiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert to_size(count) == text


def test_a_table_in_a_pipe_keeps_whole_words(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 70
    print_table("Title", ("name", "value"), [("a", long), ("b", 2)])
    shown = capsys.readouterr().out
    assert long in shown and "Title" in shown


def test_progress_elsewhere_than_on_a_terminal_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for step in range(1, 101):
        progress.update(step, 100, f"loss {step}")
    progress.say("done")
    # The first, the last, and nothing in the same five seconds between them.
    assert stream.getvalue() == "1/100 loss 1\n100/100 loss 100\ndone\n"


def test_progress_on_a_terminal_rewrites_one_line() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress.update(1, None, "rows")
    progress.update(2, None, "rows")
    progress.say("stays")
    assert stream.getvalue() == "\r1 rows\x1b[K\r2 rows\x1b[K\nstays\n"
