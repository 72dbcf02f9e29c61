"""The table of a running training, on a terminal and in a pipe."""

import io
import math

import pytest

from llama_jax.commands.steps import Steps, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def entry(loss: float = 2.5, **more: float) -> dict[str, float]:
    return {
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 12345.6,
        **more,
    }


def make(stream: io.StringIO) -> tuple[Steps, list[float]]:
    now = [0.0]
    return Steps(stream, clock=lambda: now[0]), now


def test_on_a_terminal_rows_stand_under_their_names_and_the_last_is_rewritten() -> None:
    stream = Terminal()
    steps, now = make(stream)
    for step in range(1, 41):
        now[0] = step * 10.0
        more = {"eval_loss": 3.0} if step == 7 else {}
        steps.update(step, 40, entry(mfu=0.4567, **more))
    lines = stream.getvalue().split("\n")
    header = lines[0]
    assert header.split() == [
        "step", "loss", "learning", "rate", "gradient", "norm", "tokens/s", "MFU", "left",
    ]  # fmt: skip
    first, second = lines[1].split("\x1b[K")[:2]
    assert first.startswith("\r ") and first.split()[0] == "1/40"
    assert second.split() == ["2/40", "2.5000", "1.00e-03", "0.50", "12,346", "45.7%", "?"]
    assert len(second.removeprefix("\r")) == len(header), "columns stand in line"
    # Every second step stays of forty, and the one with an evaluation.
    shown = [line.split("\r")[-1].replace("\x1b[K", "") for line in lines[1:-1]]
    assert [int(row.split("/")[0]) for row in shown] == sorted({*range(2, 41, 2), 7})
    assert shown[3].endswith("evaluation loss 3.0000") is True
    assert shown[1].split()[-1] == "6:00", "36 steps of ten seconds"
    assert shown[-1].split()[-1] == "0:00"
    assert stream.getvalue().endswith("\n")


def test_in_a_pipe_there_is_a_line_now_and_then_and_at_each_evaluation() -> None:
    stream = io.StringIO()
    steps, now = make(stream)
    for step in range(1, 101):
        now[0] = step * 0.5
        more = {"eval_loss": 3.0} if step == 15 else {}
        steps.update(step, 100, entry(**more))
    lines = stream.getvalue().splitlines()
    numbers = [int(line.split()[1].split("/")[0]) for line in lines]
    assert numbers == [1, 11, 15, 25, 35, 45, 55, 65, 75, 85, 95, 100]
    assert lines[0] == (
        "step 1/100: loss 2.5000, learning rate 1.00e-03, gradient norm 0.50, tokens/s 12,346, "
        "left ?"
    )
    assert lines[1].endswith("left 0:44") and lines[2].endswith("evaluation loss 3.0000")
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_what_is_not_a_number_is_none() -> None:
    stream = io.StringIO()
    steps, _ = make(stream)
    steps.update(1, 1, entry(loss=math.nan))
    assert "loss none, " in stream.getvalue()


def test_a_resumed_run_is_timed_from_where_it_goes_on() -> None:
    stream = io.StringIO()
    steps, now = make(stream)
    for step in range(91, 101):
        now[0] += 6.0
        steps.update(step, 100, entry())
    assert stream.getvalue().splitlines()[2].endswith("left 0:42")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (725, "12:05"),
        (12300, "3:25:00"),
        (90000, "1 day 1:00"),
        (180000, "2 days 2:00"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
