"""Weighted mixtures: which source gives which item, as arithmetic on numbers."""

from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Deals items 0, 1, 2, … to sources in proportion to their weights.

    Where any item comes from follows from its number alone, so that nothing but the number has to
    be saved. Of the first n items a source has its share of n to within one, for every n: the
    shares are taken one source after another from what the earlier ones left, each rounded to the
    nearest.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(weight) for weight in weights]
        # Of what is left when a source's turn comes, the part it takes.
        self._parts = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]

    def locate(self, number: int) -> tuple[int, int]:
        """(source, which of the source's own items) of item `number`."""
        for source, part in enumerate(self._parts):
            before = _taken(part, number)
            if _taken(part, number + 1) > before:
                return source, before
            number -= before
        raise AssertionError("the last source takes whatever is left")

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` items each source gives."""
        counts = []
        for part in self._parts:
            counts.append(_taken(part, number))
            number -= counts[-1]
        return counts


def _taken(part: Fraction, number: int) -> int:
    """part * number, rounded to the nearest integer, halves up."""
    return (2 * number * part.numerator + part.denominator) // (2 * part.denominator)
