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
COPY_LIMIT_BYTES = 512 * 2**20

_FILE_ENDINGS = (
    ".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrayrecord", ".array_record", ".gz",
    ".bz2", ".xz", ".zst", ".gguf", ".txt",
)  # fmt: skip

# Fields that name a model: a preset, one of the Hub, or a folder.
_MODELS = ("model.name", "distill.teacher")

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # cloud.google.com/storage/docs/buckets

# What of a source of rows may be a path.
_SOURCE_PATHS = ("path", "datasets", "array_record", "data_dir")


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
    config["model"]["name"] = move(run.model.name, "model.name")
    if run.model.tokenizer is not None:
        config["model"]["tokenizer"] = move(run.model.tokenizer, "model.tokenizer")
    if run.distill is not None:
        config["distill"]["teacher"] = move(run.distill.teacher, "distill.teacher")
    for name in ("train", "eval"):
        config["data"][name] = [
            _moved_source(entry, f"data.{name}[{number}]", move)
            for number, entry in enumerate(config["data"][name])
        ]
    return placed


def _moved_source(entry: Any, where: str, move: Callable[[str, str], str]) -> Any:
    """A source of rows: a path, or a mapping of which some values are paths."""
    if isinstance(entry, str):
        return move(entry, where)
    return {
        key: move(value, f"{where}.{key}") if key in _SOURCE_PATHS and value else value
        for key, value in entry.items()
    }


def _output(placed: Placed, output: str) -> str:
    if output.startswith(GS):
        return _in_bucket(placed, output, "output")
    if not output.startswith("/"):
        raise ValueError(
            f"output {output} would lie on the workers' own disks, which go away with them; "
            f"override it with output=gs://BUCKET/{output.strip('/')}, or with the absolute path "
            f"of a network file system that all workers mount"
        )
    return output


def _in_bucket(placed: Placed, url: str, where: str) -> str:
    """`gs://bucket/a/b` -> `/mnt/gcs/bucket/a/b`, and the bucket noted."""
    bucket, _, path = url.removeprefix(GS).partition("/")
    if not _BUCKET.fullmatch(bucket) or "." in path.split("/") or ".." in path.split("/"):
        raise ValueError(f"{where} {url} is not of the form gs://BUCKET/PATH")
    if where == "output" and not path.strip("/"):
        raise ValueError(f"{where} {url} is a whole bucket; name a folder in it: {url}/runs/first")
    if bucket not in placed.buckets:
        placed.buckets.append(bucket)
    return f"{MOUNT_ROOT}/{bucket}/{path}".rstrip("/")


def _mover(placed: Placed, may_copy: bool) -> Callable[[str, str], str]:
    total = 0

    def move(text: str, where: str) -> str:
        nonlocal total
        if text.startswith(GS):
            return _in_bucket(placed, text, where)
        if text.startswith(PACKAGE_PREFIX) or "://" in text:
            return text
        local = to_path(text)
        is_model = where in _MODELS
        if not local.exists() or not (_is_path(text) or local.is_file() or is_model):
            _refuse_missing(text, where)
            return text
        if is_model and not _is_path(text):
            # The name of a preset or of a Hub model that a folder here happens to share.
            raise ValueError(
                f"{where} {text} is a folder here and may be a model's name; write ./{text} to "
                f"copy the folder, or start elsewhere"
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


def _refuse_missing(text: str, where: str) -> None:
    """Raises ValueError where `text` means a local file; a name of something else passes."""
    if glob.has_magic(text) and glob.glob(text):
        raise ValueError(
            f"{where} {text} is a pattern of local files; name them one by one, or copy them to a "
            f"bucket and write gs://BUCKET/{Path(text).name}"
        )
    if text.endswith(_FILE_ENDINGS) or text.startswith(("/", "./", "../", "~")):
        raise ValueError(f"{where} {text} does not exist here; name a file, or gs://BUCKET/PATH")


def _num_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
