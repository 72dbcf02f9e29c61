"""Which rows a run trains on and which it is evaluated on: checked first, rendered later.

Rows are read twice: once to check and count them all, before anything expensive starts, and once
to be turned into samples. They are never all in memory as rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from train.config import RunConfig
from train.data.cache import SampleCache
from train.data.rows import Row
from train.data.sources import Entry, read_source, source_name
from train.sections.data import SourceSection


@dataclass(frozen=True)
class RowSet:
    """Checked rows of some sources. chosen: for each row of each source, whether it is in the
    set."""

    entries: tuple[Entry, ...]
    chosen: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(int(part.sum()) for part in self.chosen)

    def names(self) -> list[str]:
        """Of the sources, told apart by a number where two are called the same."""
        plain = [source_name(entry) for entry in self.entries]
        return [
            name if plain.count(name) == 1 else f"{name} #{plain[: i + 1].count(name)}"
            for i, name in enumerate(plain)
        ]

    def weight(self, source: int) -> float | None:
        entry = self.entries[source]
        return entry.weight if isinstance(entry, SourceSection) else None

    def read(self, source: int) -> Iterator[Row]:
        """The rows of one source that are in the set, read anew.

        Raises ValueError when their number is another one than at first.
        """
        chosen, number = self.chosen[source], 0
        for row in read_source(self.entries[source]):
            if number < len(chosen) and chosen[number]:
                yield row
            number += 1
        if number != len(chosen):
            raise ValueError(
                f"{source_name(self.entries[source])} had {len(chosen)} rows a moment ago and has "
                f"{number} now; wait until it is written"
            )


def read_run_rows(run: RunConfig) -> tuple[RowSet, RowSet]:
    """(training, evaluation) rows, checked; needs neither a tokenizer nor JAX.

    None are read where `data.cache` has what they were made into. Raises ValueError for a bad row,
    or one the method does not train on, naming where it stands.
    """
    if run.data.cache is not None and SampleCache(run).exists():
        return RowSet((), ()), RowSet((), ())
    train, held_out = _check(run, run.data.train), _check(run, run.data.eval)
    if not run.data.eval_fraction:
        return train, held_out
    sizes = [len(part) for part in train.chosen]
    held = held_out_rows(sum(sizes), run.data.eval_fraction, run.train.seed)
    parts = tuple(np.split(held, np.cumsum(sizes)[:-1]))
    return RowSet(train.entries, tuple(~part for part in parts)), RowSet(train.entries, parts)


def _check(run: RunConfig, entries: Sequence[Entry]) -> RowSet:
    counts = []
    for entry in entries:
        counts.append(0)
        for row in read_source(entry):
            if (row.kind == "preference") != (run.method == "dpo"):
                raise ValueError(
                    f"{row.where}: a {row.kind} row; method {run.method} trains on "
                    + (
                        "preference rows (prompt, chosen, rejected) alone"
                        if run.method == "dpo"
                        else "text, chat and instruction rows, preference rows are for method dpo"
                    )
                )
            counts[-1] += 1
    return RowSet(tuple(entries), tuple(np.ones(count, bool) for count in counts))


def held_out_rows(count: int, fraction: float, seed: int) -> np.ndarray:
    """[count] bool: a random part of the rows, of the given size.

    Both parts get at least one row. Raises ValueError when there are not enough for that.
    """
    if count < 2:
        raise ValueError(
            f"data.eval_fraction needs at least two rows to split, but there are {count}"
        )
    held = min(max(round(count * fraction), 1), count - 1)
    result = np.zeros(count, bool)
    result[np.random.default_rng(seed).permutation(count)[:held]] = True
    return result
