"""The files of a checkpoint folder: the description, the marker, and that no byte has changed."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from llama_jax.formats.json_fields import parse_json
from llama_jax.mesh.distributed import exchange

MANIFEST = "checkpoint.json"
MARKER = "complete.json"
VERSION = 1


class CheckpointError(ValueError):
    """A folder that is no checkpoint, not a whole one, or not that of what is asked for."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of which bytes were lost or changed."""


def is_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


# Reading


def verify(folder: str | Path) -> dict[str, Any]:
    """Reads every file once and compares it with what was written; returns the manifest.

    Raises CheckpointError naming the folder, and the file that is missing or changed.
    """
    manifest = _marked_manifest(Path(folder))
    _check_files(Path(folder), manifest, list(manifest["files"]))
    return manifest


def verify_together(folder: str | Path, name: str) -> dict[str, Any]:
    """As `verify`, each process reading its part of the files; all of them must call it, with a
    `name` that is new each time, and all get the same error."""
    folder = Path(folder)
    problem = ""
    is_damaged = False
    manifest: dict[str, Any] = {}
    try:
        manifest = _marked_manifest(folder)
        mine = sorted(manifest["files"])[jax.process_index() :: jax.process_count()]
        _check_files(folder, manifest, mine)
    except CheckpointError as error:
        problem, is_damaged = str(error), isinstance(error, DamagedCheckpointError)
    for answer in exchange(name, json.dumps([problem, is_damaged])):
        problem, is_damaged = json.loads(answer)
        if problem:
            raise (DamagedCheckpointError if is_damaged else CheckpointError)(problem)
    return manifest


def accept(folder: str | Path) -> None:
    """Writes the marker that `folder` lacks, after checking every file against the manifest."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest, list(manifest["files"]))
    (folder / MARKER).write_bytes(marker(folder))


def missing_marker(folder: Path) -> CheckpointError:
    """What is wrong with a folder that has no marker, and how to mend it."""
    return CheckpointError(
        f"{folder} has no {MARKER}: its save did not finish, or it was copied without that "
        f"file. Nothing was changed. If you know that it is whole, check and accept it with "
        f"llama_jax.formats.checkpoint.accept({str(folder)!r}); otherwise move it away"
    )


def _marked_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        if (folder / MARKER).is_file():
            raise _damaged(folder, f"the file {MANIFEST} is missing")
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    if not (folder / MARKER).is_file():
        raise missing_marker(folder)
    if (folder / MARKER).read_bytes() != marker(folder):
        raise _damaged(folder, f"{MARKER} does not fit {MANIFEST}")
    return read_manifest(folder)


def _check_files(folder: Path, manifest: Mapping[str, Any], names: list[str]) -> None:
    for name in names:
        path, entry = folder / name, manifest["files"][name]
        if not path.is_file():
            raise _damaged(folder, f"the file {name} is missing")
        if path.stat().st_size != entry["bytes"] or _hash(path) != entry["sha256"]:
            raise _damaged(folder, f"{name} is not the file that was written")


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read: {error}") from error
    if version != VERSION:
        raise CheckpointError(
            f"{folder} was written in version {version!r} of the checkpoint format; this program "
            f"reads version {VERSION}"
        )
    missing = [
        key for key in ("config", "leaves", "groups", "extra", "files") if key not in manifest
    ]
    if missing:
        raise _damaged(folder, f"{MANIFEST} says nothing about {', '.join(missing)}")
    return manifest


def _damaged(folder: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{folder} is damaged: {what}")


def marker(folder: Path) -> bytes:
    """What the marker of `folder` must hold."""
    return json.dumps({"sha256": _hash(folder / MANIFEST)}).encode() + b"\n"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of the named files of `folder`, which are on the disk then."""
    entries = {}
    for name in names:
        path = folder / name
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        entries[name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    return entries


def file_names(folder: Path) -> list[str]:
    """Of all files in `folder`, in order."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The description, and behind it the marker that makes the folder a checkpoint."""
    text = json.dumps({"format": "llama-jax checkpoint", "version": VERSION, **manifest}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    (folder / MARKER).write_bytes(marker(folder))
