"""A step of rows as plain data, without choices and arrays of the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infer.sampling import Needs, Rows

# Of a row: the position of its first token in the step, its tokens there, and its blocks.
Placed = tuple[int, Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Plan:
    """rows, length: the step's shape. placed: the tokens that run, by slot. adapters: of each row.
    The others are of each of the rows * length tokens that are taken: `memory` is the slot that
    remembers it, `masks` what a structure allows, by place, `columns` and `needs` how it is chosen,
    `taken` its number in its answer.
    """

    rows: int
    length: int
    placed: Mapping[int, Placed]
    adapters: Sequence[int]
    memory: Sequence[int]
    masks: Mapping[int, np.ndarray]
    columns: Rows
    taken: Sequence[int]
    needs: Needs
