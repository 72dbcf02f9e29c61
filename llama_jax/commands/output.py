"""Folders and files that commands write: checked before work starts, counted afterwards."""

from collections.abc import Sequence
from pathlib import Path

from llama_jax.paths import to_path


def check_out(out: str, model: str) -> Path:
    """The path to write to. Raises ValueError for an empty name and for one that is the model's
    own folder or lies inside it, where reading and writing would meet, or around it, where the
    model would be replaced with the rest."""
    if not out.strip() or "\0" in out:
        raise ValueError("OUT is empty; name the folder or file to write")
    target, source = Path(out), to_path(model)
    if source.exists():
        place, origin = target.resolve(), source.resolve()
        if place.is_relative_to(origin):
            raise ValueError(f"OUT {out} is MODEL {model} or lies in it; choose another place")
        if origin.is_relative_to(place):
            raise ValueError(f"MODEL {model} lies in OUT {out}; choose another place")
    return target


def num_bytes(paths: Sequence[Path]) -> int:
    """Bytes of files and, for folders, of the files in them."""
    total = 0
    for path in paths:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        total += sum(file.stat().st_size for file in files)
    return total
