"""Which samples share a row."""

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of sample numbers whose lengths add up to at most `capacity`.

    Each sample goes, in order, to the first group that has room for it. A tree of the largest room
    among groups finds that group in O(log n).
    """
    size = 1
    while size < max(len(lengths), 1):
        size *= 2
    room = [capacity] * (2 * size)
    groups: list[list[int]] = []
    for number, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"sample {number} has {length} tokens; a row holds 1 to {capacity}")
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        group = node - size
        if group == len(groups):
            groups.append([])
        groups[group].append(number)
        room[node] -= int(length)
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return groups
