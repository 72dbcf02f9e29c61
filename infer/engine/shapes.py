"""The few shapes that steps come in. No JAX here.

Pieces of prompts have `pieces` tokens, and `rows` rows take a token together. Where steps of fewer
than eight tokens turn out to sum in another order than larger ones (see `trial.py`), few rows are
filled up to eight tokens.
"""

import itertools

from infer.engine.options import EngineOptions

FEWEST_TOKENS = 8  # of steps that are filled up
_SHORTEST_PIECE = 32
_FEWEST_ROWS = 2


def piece_shapes(piece_tokens: int) -> list[int]:
    """A short one for short prompts and ends of long ones, and the whole. Each costs a second of
    every start, so there are few."""
    return sorted({min(_SHORTEST_PIECE, piece_tokens), piece_tokens})


def row_shapes(max_slots: int, *, exact: bool) -> list[int]:
    """1 or 2, then 8, 24, 48, 96, …, max_slots: a step of 8 rows takes hardly longer than one of 4,
    and each shape is one more to make ready at every start."""
    fewest = _FEWEST_ROWS if exact else 1
    sizes = itertools.chain([fewest, FEWEST_TOKENS], (24 * 2**n for n in itertools.count()))
    smaller = itertools.takewhile(lambda size: size < max_slots, sizes)
    return [*smaller, max(max_slots, fewest)]


def drafted_shapes(options: EngineOptions) -> list[int]:
    """Rows of the steps that have room for guesses."""
    shapes = row_shapes(options.max_slots, exact=options.exact)
    return [rows for rows in shapes if rows <= options.max_drafted_rows]


def draft_slots(options: EngineOptions) -> int:
    """Slots of a draft model: those of the largest such step, and one for work that belongs to no
    choice."""
    return 1 + max(drafted_shapes(options), default=0)


class Shapes:
    """Of one runner. pieces: tokens of pieces. rows: numbers of rows. least_tokens: that a step
    has, filled up or not."""

    def __init__(self, options: EngineOptions, *, least_tokens: int):
        self._options, self._least_tokens = options, least_tokens
        self.pieces = piece_shapes(options.piece_tokens)
        self.reset()

    def reset(self) -> None:
        """All numbers of rows, none filled up."""
        self.rows = row_shapes(self._options.max_slots, exact=self._options.exact)
        self._filled: set[int] = set()  # numbers of rows whose steps are filled up with tokens

    def lengths(self, rows: int) -> list[int]:
        """Tokens a row that steps of so many rows come in: enough for all steps to sum alike, and
        for guessed ones."""
        tokens = FEWEST_TOKENS if rows in self._filled else self._least_tokens
        least = -(-tokens // rows) if self._options.exact else 1
        guessed = 1 + self._options.draft_tokens
        if guessed <= least or rows > self._options.max_drafted_rows:
            return [least]
        return [least, guessed]

    def steps(self) -> list[tuple[int, int]]:
        """Rows, and tokens a row, of the steps in which rows take a token."""
        return [(rows, length) for rows in self.rows for length in self.lengths(rows)]

    def fill(self, rows: int) -> bool:
        """Gives steps of so many rows enough tokens; False where they have them."""
        if rows * self.lengths(rows)[0] >= FEWEST_TOKENS:
            return False
        self._filled.add(rows)
        return True
