"""Where the paths of a run config lie on the workers: in a mounted bucket, or copied beside it.

A bucket is mounted on every worker under one path, so that models, data and run folder are
ordinary files there, whichever part of the program reads them.
"""

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.paths import to_path
from train.config import RunConfig
from train.data.files import PACKAGE_PREFIX

MOUNT_ROOT = "/mnt/gcs"
GS = "gs://"
_LOCAL_URLS = ("file://", "local://")  # of fsspec, which opens what a source of rows names
COPY_LIMIT_BYTES = 512 * 2**20

_FILE_ENDINGS = (
    ".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrayrecord", ".array_record", ".gz",
    ".bz2", ".xz", ".zst", ".gguf", ".txt",
)  # fmt: skip

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # cloud.google.com/storage/docs/buckets

# What a field may name: a path or something elsewhere of that name (a preset, what the Hub has),
# files, or a folder.
_NAME, _FILES, _FOLDER = "name", "files", "folder"

# What of a source of rows may be a path.
_SOURCE_PATHS = {"path": _FILES, "datasets": _NAME, "array_record": _FILES, "data_dir": _FOLDER}

Move = Callable[[str, str, str], str]


@dataclass
class Placed:
    """A config as the workers read it. copies: name beside the config -> what to copy there."""

    config: dict[str, Any]
    buckets: list[str] = field(default_factory=list)
    copies: dict[str, Path] = field(default_factory=dict)

    @property
    def output(self) -> str:
        return str(self.config["output"])


def place(run: RunConfig, *, may_copy: bool) -> Placed:
    """The run's config with every path as the workers see it.

    Copies lie beside the config, where training is started, so their paths are relative. Raises
    ValueError for a run folder that would be lost with the machines, and for local files that are
    missing, too large or cannot be copied.
    """
    placed = Placed(run.to_dict())
    config = placed.config
    config["output"] = _output(placed, run.output)
    move = _mover(placed, may_copy)
    config["model"]["name"] = move(run.model.name, "model.name", _NAME)
    if run.model.tokenizer is not None:
        config["model"]["tokenizer"] = move(run.model.tokenizer, "model.tokenizer", _NAME)
    if run.distill is not None:
        config["distill"]["teacher"] = move(run.distill.teacher, "distill.teacher", _NAME)
    for name in ("train", "eval"):
        config["data"][name] = [
            _moved_source(entry, f"data.{name}[{number}]", move)
            for number, entry in enumerate(config["data"][name])
        ]
    return placed


def _moved_source(entry: Any, where: str, move: Move) -> Any:
    """A source of rows: a path, or a mapping of which some values are paths."""
    if isinstance(entry, str):
        return move(entry, where, _FILES)
    return {
        key: move(value, f"{where}.{key}", _SOURCE_PATHS[key])
        if key in _SOURCE_PATHS and value
        else value
        for key, value in entry.items()
    }


def _output(placed: Placed, output: str) -> str:
    if output.startswith(GS):
        return _in_bucket(placed, output, "output")
    if "://" in output:
        raise ValueError(
            f"output {output} is in no bucket; override it with output=gs://BUCKET/PATH"
        )
    if not output.startswith("/"):
        raise ValueError(
            f"output {output} would lie on the workers' own disks, which go away with them; "
            f"override it with output=gs://BUCKET/{_below(output)}, or with the absolute path "
            f"of a network file system that all workers mount"
        )
    return output


def _below(output: str) -> str:
    """The part of a local path that can follow a bucket."""
    parts = [part for part in output.split("/") if part.strip(".") and not part.startswith("~")]
    return "/".join(parts) or "runs/first"


def _in_bucket(placed: Placed, url: str, where: str) -> str:
    """`gs://bucket/a/b` -> `/mnt/gcs/bucket/a/b`, and the bucket noted."""
    bucket, _, path = url.removeprefix(GS).partition("/")
    if not _BUCKET.fullmatch(bucket) or "." in path.split("/") or ".." in path.split("/"):
        raise ValueError(f"{where} {url} is not of the form gs://BUCKET/PATH")
    if where == "output" and not path.strip("/"):
        raise ValueError(
            f"{where} {url} is a whole bucket; name a folder in it: {GS}{bucket}/runs/first"
        )
    if bucket not in placed.buckets:
        placed.buckets.append(bucket)
    return f"{MOUNT_ROOT}/{bucket}/{path}".rstrip("/")


def _mover(placed: Placed, may_copy: bool) -> Move:
    total = 0

    def move(text: str, where: str, kind: str) -> str:
        nonlocal total
        if text.startswith(GS):
            return _in_bucket(placed, text, where)
        if text.startswith(_LOCAL_URLS):
            raise ValueError(
                f"{where} {text} is a URL of a file of this machine; write its path, or "
                f"gs://BUCKET/PATH"
            )
        if text.startswith(PACKAGE_PREFIX) or "://" in text:
            return text
        local = to_path(text)
        if not local.exists():
            _refuse_missing(text, where, kind)
            return text
        if kind == _NAME and not _is_path(text):
            # The name of a preset or of something on the Hub that a folder here happens to share.
            raise ValueError(
                f"{where} {text} is a {'folder' if local.is_dir() else 'file'} here and may be a "
                f"name of something elsewhere; write ./{text} to copy it, or start elsewhere"
            )
        if kind == _FILES and local.is_dir():
            raise ValueError(
                f"{where} {text} is a folder; name its files one by one, or copy it to a bucket "
                f"and write gs://BUCKET/PATH/*.jsonl"
            )
        if not may_copy:
            raise ValueError(
                f"{where} {text} is a local file, which pods do not see; copy it to a bucket "
                f"(gcloud storage cp -r {text} gs://BUCKET/) and name that"
            )
        total += _num_bytes(local)
        if total > COPY_LIMIT_BYTES:
            raise ValueError(
                f"{where} {text}: copying more than {COPY_LIMIT_BYTES >> 20} MiB to every worker "
                f"is slow and happens again after each preemption; copy it to a bucket once "
                f"(gcloud storage cp -r {text} gs://BUCKET/) and name that"
            )
        # Numbered, because files of different folders may share a name.
        name = f"{len(placed.copies)}-{local.resolve().name}"
        placed.copies[f"copied/{name}"] = local
        return f"./copied/{name}"

    return move


def _is_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.endswith(_FILE_ENDINGS) or "/" in text


def _refuse_missing(text: str, where: str, kind: str) -> None:
    """Raises ValueError where `text` means a local file; a name of something else passes."""
    if glob.has_magic(text) and glob.glob(text):
        raise ValueError(
            f"{where} {text} is a pattern of local files; name them one by one, or copy them to a "
            f"bucket and write gs://BUCKET/{Path(text).name}"
        )
    is_path = text.endswith(_FILE_ENDINGS) or text.startswith(("/", "./", "../", "~"))
    if is_path or kind != _NAME:
        raise ValueError(f"{where} {text} does not exist here; name a file, or gs://BUCKET/PATH")


def _num_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
