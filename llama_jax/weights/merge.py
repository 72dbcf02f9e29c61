"""The arithmetic of merging: several versions of one tensor become one.

Tensors come as rows of bounded size, so that a model of any size merges in little memory. What a
method must know of a whole tensor (TIES' threshold, SLERP's angle) is gathered in passes over the
rows before. Arithmetic is in float32, or in float64 where an input holds float32, so that a
difference of weights loses nothing; the caller rounds the result once.

Chat vector: Huang et al. 2023 (arXiv:2310.04799). Task arithmetic: Ilharco et al. 2022
(arXiv:2212.04089). Linear: Wortsman et al. 2022 (arXiv:2203.05482). TIES: Yadav et al. 2023
(arXiv:2306.01708). DARE: Yu et al. 2023 (arXiv:2311.03099). SLERP: Shoemake 1985.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llama_jax.weights.merge_recipe import Recipe

Rows = list[np.ndarray]  # the same rows of every input, in the order of the recipe's inputs
Combine = Callable[[Rows], np.ndarray]
# Two vectors closer than this are taken to be parallel: the sine of their angle is too small to
# divide by.
_PARALLEL = 0.9995
_BITS = 16


def make_combine(recipe: Recipe, passes: Callable[[], Iterator[Rows]], name: str) -> Combine:
    """The function that merges rows of the tensor `name`; it must be given all rows in order.

    `passes()` goes through the tensor's rows once more; methods that need no look ahead leave it
    alone. Where nothing is to change (ratio 0, weight 0) the first input's rows come back as they
    are, signs of zeros included.
    """
    match recipe.method:
        case "chat_vector":
            return lambda rows: _chat_vector(rows, recipe.ratio)
        case "linear":
            return lambda rows: _linear(rows, recipe)
        case "slerp":
            return _make_slerp(recipe.t, passes)
        case "task_arithmetic":
            return lambda rows: _add(rows[0], _plain_sum(_deltas(rows), recipe), recipe)
        case "ties":
            return _make_ties(recipe, passes)
        case "dare":
            return _make_dare(recipe, name)
    raise AssertionError(f"{recipe.method} is no method")


def _chat_vector(rows: Rows, ratio: float) -> np.ndarray:
    target, base, chat = rows
    return target if ratio == 0 else target + ratio * (chat - base)


def _linear(rows: Rows, recipe: Recipe) -> np.ndarray:
    total = None
    for row, entry in zip(rows, recipe.entries, strict=True):
        if entry.weight:
            part = row if entry.weight == 1 else entry.weight * row
            total = part if total is None else total + part
    if total is None:
        return np.zeros_like(rows[0])
    divisor = sum(entry.weight for entry in recipe.entries) if recipe.normalize else 1.0
    return total if divisor == 1 else total / divisor


# SLERP


def _make_slerp(t: float, passes: Callable[[], Iterator[Rows]]) -> Combine:
    if t in (0.0, 1.0):
        return lambda rows: rows[int(t)]
    squares, product = np.zeros(2), 0.0
    for rows in passes():
        a, b = (row.astype(np.float64, copy=False).reshape(-1) for row in rows)
        squares += (a @ a, b @ b)
        product += float(a @ b)
    norms = math.sqrt(squares[0] * squares[1])
    cosine = min(1.0, max(-1.0, product / norms)) if norms else 1.0
    if abs(cosine) > _PARALLEL:
        first, second = 1.0 - t, t
    else:
        angle = math.acos(cosine)
        first = math.sin((1.0 - t) * angle) / math.sin(angle)
        second = math.sin(t * angle) / math.sin(angle)
    return lambda rows: first * rows[0] + second * rows[1]


# Task vectors: what each model has learned beyond the base


def _deltas(rows: Rows) -> Rows:
    return [row - rows[0] for row in rows[1:]]


def _plain_sum(deltas: Rows, recipe: Recipe) -> np.ndarray | None:
    total = None
    for delta, entry in zip(deltas, recipe.entries, strict=True):
        if entry.weight:
            part = entry.weight * delta
            total = part if total is None else total + part
    if total is not None and recipe.normalize:
        total = total / sum(entry.weight for entry in recipe.entries)
    return total


def _elected_sum(deltas: Rows, recipe: Recipe) -> np.ndarray:
    """TIES' election and disjoint merge: the sign of the larger total wins in each place, and only
    the values that have it are added (normalized: averaged)."""
    weights = [entry.weight for entry in recipe.entries]
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    elected = np.where(sum(weighted) >= 0, 1.0, -1.0)
    total, divisor = np.zeros_like(weighted[0]), np.zeros_like(weighted[0])
    for weight, delta in zip(weights, weighted, strict=True):
        agrees = np.sign(delta) == elected
        total += np.where(agrees, delta, 0)
        divisor += np.where(agrees, weight, 0)
    if recipe.normalize:
        total /= np.where(divisor == 0, 1, divisor)
    return total


def _add(base: np.ndarray, total: np.ndarray | None, recipe: Recipe) -> np.ndarray:
    if total is None or recipe.scale == 0:
        return base
    return base + (total if recipe.scale == 1 else recipe.scale * total)


def _make_ties(recipe: Recipe, passes: Callable[[], Iterator[Rows]]) -> Combine:
    if recipe.scale == 0 or not any(entry.weight for entry in recipe.entries):
        return lambda rows: rows[0]
    keepers = [
        _Keeper(number, entry.density, passes) for number, entry in enumerate(recipe.entries)
    ]

    def combine(rows: Rows) -> np.ndarray:
        kept = [keep(delta) for keep, delta in zip(keepers, _deltas(rows), strict=True)]
        return _add(rows[0], _elected_sum(kept, recipe), recipe)

    return combine


class _Keeper:
    """Zeroes all but the `density` largest values of one task vector, given in order.

    The threshold is exact: sizes are counted by the bits of their float32 form, whose order is
    theirs, in two passes of 65,536 counters. Of equal values at the threshold the first are kept.
    """

    def __init__(
        self, number: int, density: float | None, passes: Callable[[], Iterator[Rows]]
    ) -> None:
        assert density is not None
        self._all = density >= 1
        if self._all:
            return

        def keys() -> Iterator[np.ndarray]:
            return (_sizes(rows[number + 1] - rows[0]).reshape(-1) for rows in passes())

        high = np.zeros(1 << _BITS, np.int64)
        for key in keys():
            high += np.bincount(key >> _BITS, minlength=len(high))
        count = int(high.sum())
        wanted = max(1, int(density * count)) if density and count else 0
        top, left = _cut(high, wanted)
        low = np.zeros(1 << _BITS, np.int64)
        for key in keys():
            inside = key[key >> _BITS == top] & (len(low) - 1)
            low += np.bincount(inside, minlength=len(low))
        bottom, self._ties_left = _cut(low, left)
        self._threshold = (top << _BITS) + bottom

    def __call__(self, delta: np.ndarray) -> np.ndarray:
        if self._all:
            return delta
        key = _sizes(delta)
        kept = key > self._threshold
        at = np.flatnonzero(key.reshape(-1) == self._threshold)[: self._ties_left]
        kept.reshape(-1)[at] = True
        self._ties_left -= len(at)
        return np.where(kept, delta, 0)


def _sizes(delta: np.ndarray) -> np.ndarray:
    """Integers in the order of absolute values."""
    return np.abs(delta).astype(np.float32, copy=False).view(np.uint32).astype(np.int64)


def _cut(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """(the bin that holds the smallest of the `wanted` largest values, how many of its values are
    among them); a bin beyond the last when none are wanted."""
    if not wanted:
        return len(counts), 0
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, wanted))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before


def _make_dare(recipe: Recipe, name: str) -> Combine:
    """Every value is dropped with probability 1 - density, the rest divided by density. The draw
    of a tensor depends on the seed, its name and the place of the model in the list alone."""

    def generator(number: int) -> np.random.Generator:
        digest = hashlib.sha256(f"{recipe.seed} {number} {name}".encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, np.uint32))

    generators = [generator(number) for number in range(len(recipe.entries))]

    def combine(rows: Rows) -> np.ndarray:
        kept = []
        for entry, draw, delta in zip(recipe.entries, generators, _deltas(rows), strict=True):
            assert entry.density is not None
            keep = draw.random(delta.shape, np.float32) < entry.density
            kept.append(np.where(keep, delta / entry.density, 0))
        if recipe.elect_sign and any(entry.weight for entry in recipe.entries):
            return _add(rows[0], _elected_sum(kept, recipe), recipe)
        return _add(rows[0], _plain_sum(kept, recipe), recipe)

    return combine


def widest(dtypes: Sequence[np.dtype]) -> np.dtype:
    """What is calculated in: float64 where an input holds more than 16 bits, else float32."""
    return np.dtype(np.float64 if any(kind.itemsize > 2 for kind in dtypes) else np.float32)
