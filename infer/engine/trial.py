"""Which numbers of rows give the same results, bit for bit, as the largest. No JAX here.

How a product sums may follow from its size. Which sizes agree depends on the machine, so they are
tried out.
"""

from collections.abc import Callable, Sequence

import numpy as np

from infer.engine.shapes import Shapes


class InexactError(RuntimeError):
    """No steps that sum alike are left. All processes of a group find the same."""


class Trial:
    """run: the results of a step of so many rows, and tokens a row, [rows, V]. fill: as
    `Shapes.fill`, and makes the longer steps ready."""

    def __init__(
        self,
        shapes: Shapes,
        *,
        run: Callable[[int, int], np.ndarray],
        fill: Callable[[int], bool],
    ):
        self._shapes, self._run, self._fill = shapes, run, fill

    def alike(self) -> list[int]:
        """Of `shapes.rows`, those that sum as the largest does, filled up where that helps."""
        *smaller, largest = self._shapes.rows
        wanted, *drafted = self._results(largest)
        if not _all_equal(drafted, wanted):
            if self._fill(largest):
                return self.alike()
            raise InexactError(
                "draft_tokens changes sums on this machine, so an answer could depend on what was "
                "guessed; set it to 0, or exact to false"
            )
        kept = [rows for rows in smaller if self._sums_alike(rows, wanted)]
        if kept != smaller and self._fill(largest):
            return self.alike()
        return [*kept, largest]

    def _sums_alike(self, rows: int, wanted: np.ndarray) -> bool:
        if _all_equal(self._results(rows), wanted[:rows]):
            return True
        return self._fill(rows) and self._sums_alike(rows, wanted)

    def _results(self, rows: int) -> list[np.ndarray]:
        return [self._run(rows, length) for length in self._shapes.lengths(rows)]


def _all_equal(results: Sequence[np.ndarray], wanted: np.ndarray) -> bool:
    return all(np.array_equal(one, wanted, equal_nan=True) for one in results)
