"""Where answers and progress go: the answer to standard output, all else to standard error."""

import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

PLAIN_LINE_SECONDS = 5.0


def to_json(report: Any) -> str:
    """One line of standard JSON.

    JSON has no NaN and no infinity (a perplexity can overflow, a loss can diverge): they
    become null, as in JavaScript's own encoder. Bytes of a path that are no text are escaped, as
    Python reads them back.
    """
    finite = _finite(report)
    text = json.dumps(finite, allow_nan=False, ensure_ascii=False)
    return text if _is_unicode(text) else json.dumps(finite, allow_nan=False)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Rich cuts at 80 columns where there is no terminal; a pipe wants whole lines.
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False).print(table)


def to_size(num_bytes: int) -> str:
    """Bytes for a person, in units of 1024."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


class Progress:
    """Says on standard error how far long work is: one line rewritten on a terminal,
    elsewhere a plain line now and then and at the end.

    `update(done, total, note)`; `say(text)` prints a line that stays.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._last = -math.inf
        self._open = False

    def say(self, text: str) -> None:
        self._end_line()
        self._write(f"{text}\n")

    def update(self, done: int, total: int | None, note: str) -> None:
        now = time.monotonic()
        finished = total is not None and done >= total
        if not self._live and not finished and now - self._last < PLAIN_LINE_SECONDS:
            return
        self._last = now
        line = f"{done}/{total} {note}" if total is not None else f"{done} {note}"
        if not self._live:
            self._write(f"{line}\n")
            return
        # Erase the rest of the line: the one before may have been longer.
        self._write(f"\r{line}\x1b[K")
        self._open = True
        if finished:
            self._end_line()

    def _end_line(self) -> None:
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
