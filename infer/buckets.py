"""The few sizes that steps are compiled for: sizes are rounded up, so new lengths compile nothing.

Powers of two, and from 64 on also three quarters of each: 16, 32, 64, 96, 128, 192, 256, 384, …
Rounding up wastes a third at most there. Rows of a batch: 1, 2, 4, 6, 8, 12, 16, 24, 32, …
"""

SMALLEST_TOKENS = 16


def bucket(size: int, *, smallest: int, quarters_above: int) -> int:
    """The smallest of the allowed sizes that is at least `size`."""
    power = max(smallest, 1 << (size - 1).bit_length())
    three_quarters = power * 3 // 4
    if three_quarters >= max(size, smallest) and three_quarters > quarters_above:
        return three_quarters
    return power


def token_bucket(num_tokens: int) -> int:
    """Of prompt lengths and of cache capacities."""
    return bucket(num_tokens, smallest=SMALLEST_TOKENS, quarters_above=64)


def row_bucket(num_rows: int, *, multiple_of: int = 1) -> int:
    """Of the rows of a batch; a mesh wants a multiple of the devices that share the rows."""
    rows = bucket(num_rows, smallest=1, quarters_above=4)
    return -(-rows // multiple_of) * multiple_of
