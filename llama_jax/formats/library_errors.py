"""Errors of the tokenizers library as ones that users can act on."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def as_value_error(problem: str) -> Iterator[None]:
    """Whatever the library raises inside becomes a ValueError: `problem`, then its own words.

    It raises nothing narrower than Exception. Where its Rust panics, not even that: a
    PanicException, which cannot be imported, passes by every handler that leaves interrupts alone.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{problem}: {error}") from error
