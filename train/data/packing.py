"""Which samples share a row."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np


class Groups(Sequence[list[int]]):
    """Which samples each row holds, as two arrays: a list a row would not fit for many rows.

    members: sample numbers, row after row; ends: [rows + 1], where each row's members end.
    """

    def __init__(self, members: np.ndarray, ends: np.ndarray):
        self.members, self.ends = members, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.members[self.ends[index] : self.ends[index + 1]].tolist()

    @classmethod
    def one_each(cls, start: int, stop: int) -> "Groups":
        """Samples start to stop, each in a row of its own."""
        return cls(np.arange(start, stop), np.arange(stop - start + 1))

    @classmethod
    def joined(cls, parts: Sequence["Groups"]) -> "Groups":
        """The rows of all parts, one part after another."""
        members = np.concatenate([part.members for part in parts])
        sizes = np.concatenate([np.diff(part.ends) for part in parts])
        return cls(members, np.concatenate([[0], np.cumsum(sizes)]))


def pack(lengths: np.ndarray, capacity: int, *, first: int = 0) -> Groups:
    """First-fit packing, longest samples first, of samples numbered from `first` on.

    Long samples open rows and short ones fill what they leave, which wastes a third to a half of
    what first-fit in the given order does. A row's samples are in the order of their numbers, and
    rows in that of their first samples, so that packing by itself sorts nothing by length.
    """
    order = np.argsort(-lengths, kind="stable")
    group = np.empty(len(lengths), np.int64)
    group[order] = first_fit(lengths[order], capacity)
    # Rows numbered anew by their first samples.
    _, opens, number = np.unique(group, return_index=True, return_inverse=True)
    rank = np.empty(len(opens), np.int64)
    rank[np.argsort(opens, kind="stable")] = np.arange(len(opens))
    row = rank[number]
    members = np.argsort(row, kind="stable")
    ends = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(opens)))])
    return Groups(members + first, ends)


def first_fit(lengths: np.ndarray | Sequence[int], capacity: int) -> np.ndarray:
    """The group [n] of each sample: the first, in order, that has room for it.

    A tree of the largest room among groups finds that group in O(log n).
    """
    size = 1
    while size < max(len(lengths), 1):
        size *= 2
    room = array("q", [capacity]) * (2 * size)
    groups = array("q", bytes(8 * len(lengths)))
    for number, length in enumerate(np.asarray(lengths).tolist()):
        if not 0 < length <= capacity:
            raise ValueError(f"sample {number} has {length} tokens; a row holds 1 to {capacity}")
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        groups[number] = node - size
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return np.asarray(groups, np.int64)
