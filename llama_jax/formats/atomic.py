"""Folders that appear whole or not at all.

A folder is filled under a temporary name beside its target, flushed, and renamed: a crash leaves
the temporary folder, never a target that looks complete.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# The files that mark a folder as a model of one of the formats written here.
DESCRIPTIONS = ("config.json", "adapter_config.json", "checkpoint.json")
# What a training run has in its folder, whose config.json describes no model.
_OF_A_RUN = ("checkpoints", "metrics.jsonl")


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an error.

    A target that is not empty is refused unless `overwrite`. It is then moved aside before the new
    folder takes its name and deleted afterwards, so at every moment one of the two is whole on the
    disk. Only a folder with the description of a model in it is overwritten: a mistyped
    path never deletes something that is not a model.
    """
    final = Path(os.path.realpath(target))
    check_target(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.tmp-", dir=final.parent))
    try:
        with naming(final):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for path in sorted(temporary.rglob("*")):
                _flush(path)
            _flush(temporary)
            _publish(temporary, final, overwrite=overwrite)
    except BaseException:
        _remove(temporary)
        raise


def _remove(folder: Path) -> None:
    """With what threads of an array store that has failed still put there."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.05)


@contextlib.contextmanager
def naming(target: Path) -> Iterator[None]:
    """An error of the system that names no file, as that of a full disk, is one about `target`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise


def check_target(target: str | Path, *, overwrite: bool) -> None:
    """Raises ValueError unless a folder may be written at `target`."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose a folder that does not exist yet")
    check_parents(target)
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{target} exists and is not empty; choose another folder or allow overwriting "
            f"(overwrite=True, --overwrite)"
        )
    if not any((target / name).is_file() for name in DESCRIPTIONS):
        raise ValueError(
            f"{target} holds none of {', '.join(DESCRIPTIONS)}, so it is not a model and is "
            f"not overwritten; choose another folder or empty it yourself"
        )
    found = [name for name in _OF_A_RUN if (target / name).exists()]
    if found:
        raise ValueError(
            f"{target} holds {' and '.join(found)}, so it is a training run, more than a model, "
            f"and is not overwritten; choose another folder or delete it yourself"
        )


def check_parents(target: Path) -> None:
    """Raises ValueError where a file stands in the way of the folder around `target`."""
    there = next((path for path in target.absolute().parents if path.exists()), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"{target} lies in {there}, which is a file; choose another place")


def _publish(temporary: Path, final: Path, *, overwrite: bool) -> None:
    # Another process may have written the target in the meantime.
    check_target(final, overwrite=overwrite)
    aside = None
    if final.is_dir() and any(final.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.old-", dir=final.parent))
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    _flush(final.parent)
    if aside is not None:
        shutil.rmtree(aside)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
