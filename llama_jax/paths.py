"""Paths as users write them, where no shell has read them."""

from pathlib import Path


def to_path(text: str | Path) -> Path:
    """`~` and `~name` are home folders. Raises ValueError for one that is not known here."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{str(text)!r} begins with a home folder that is not known here; write the path in "
            f"full, or set HOME"
        ) from error
