"""Tokenized rows kept on disk, found again by what they were made from.

An entry is a folder named by a hash of everything that decides the samples but the tokenizer's
content: the sources with their files' sizes and times, the settings, the version of this program.
The tokenizer, and a hash of every file, are compared when the entry is opened. An entry appears
whole or not at all, so that processes and runs may share the folder.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import llama_jax
from llama_jax.formats.atomic import check_parents
from llama_jax.formats.json_fields import read_json
from llama_jax.paths import to_path
from train.config import RunConfig
from train.data.files import find_files
from train.data.report import DataReport
from train.data.samples import Samples
from train.data.sources import Entry, source_name
from train.sections.data import SourceSection

_MANIFEST, _REPORTS = "manifest.json", "reports.json"
# Of what lies in an entry; entries of another form are not found.
_FORM = 2


class SampleCache:
    """The entry of one run config in `data.cache`."""

    def __init__(self, run: RunConfig):
        assert run.data.cache is not None
        if "://" in run.data.cache:
            raise ValueError(
                f"data.cache is {run.data.cache}; it must be a local folder, whose files are "
                f"mapped into memory"
            )
        root = to_path(run.data.cache)
        if root.exists() and not root.is_dir():
            raise ValueError(f"data.cache {root} is a file; name a folder")
        check_parents(root)
        self.folder = root / _key(run)[:32]

    def exists(self) -> bool:
        return (self.folder / _MANIFEST).is_file()

    def load(self, tokenizer: Any) -> dict[str, tuple[Samples, DataReport]]:
        """By name (train, eval). Raises ValueError when another tokenizer made them, and for files
        that are not as they were written."""
        made_by, files = self._manifest()
        if made_by != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"the samples in {self.folder} were made with another tokenizer or chat template "
                f"under the same name; delete that folder, or name another data.cache"
            )
        for name, wanted in files.items():
            path = self.folder / name
            if not path.is_file() or _hash(path) != wanted:
                raise ValueError(f"{path} is not as it was written; {self._advice()}")
        return {
            name: (Samples.load(self.folder / name), DataReport.from_dict(report))
            for name, report in read_json(self.folder / _REPORTS).items()
        }

    def _manifest(self) -> tuple[str, dict[str, str]]:
        """The fingerprint of the tokenizer, and the hash of each file."""
        path = self.folder / _MANIFEST
        try:
            manifest = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; {self._advice()}") from error
        made_by, files = manifest.get("tokenizer"), manifest.get("files")
        if not isinstance(made_by, str) or not isinstance(files, dict) or _REPORTS not in files:
            raise ValueError(f"{path} does not say what lies beside it; {self._advice()}")
        return made_by, files

    def _advice(self) -> str:
        return f"delete {self.folder} to have the samples made anew"

    def new(self) -> Path:
        """An empty folder to fill and then `keep`."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="unfinished-", dir=self.folder.parent))

    def keep(self, made: Path, tokenizer: Any, reports: dict[str, DataReport]) -> None:
        """Makes `made` the entry; where another process was faster, its entry stays."""
        values = {name: report.to_dict() for name, report in reports.items()}
        (made / _REPORTS).write_text(json.dumps(values, indent=1), encoding="utf-8")
        files = sorted(path for path in made.rglob("*") if path.is_file())
        manifest = {
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "files": {str(path.relative_to(made)): _hash(path) for path in files},
        }
        (made / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        try:
            made.rename(self.folder)
        except OSError:
            if not self.exists():
                raise
            shutil.rmtree(made)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of all that turns a row into ids."""
    what = {
        "backend": tokenizer.backend.to_str(),
        "templates": dict(tokenizer.chat_templates),
        "special": dict(tokenizer.special_tokens),
        "ends": list(tokenizer.eos_token_ids),
        "adds": [tokenizer.adds_bos, tokenizer.adds_eos],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _key(run: RunConfig) -> str:
    data = run.to_dict()["data"]
    settings = ("train", "eval", "eval_fraction", "long_rows", "long_texts", "template_date")
    what = {
        "version": llama_jax.__version__,
        "form": _FORM,
        "data": {name: data[name] for name in settings},
        "files": [_state(entry) for entry in (*run.data.train, *run.data.eval)],
        "method": run.method,
        "sequence_length": run.train.sequence_length,
        "seed": run.train.seed if run.data.eval_fraction else None,
        "tokenizer": [run.model.name, run.model.tokenizer],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _state(entry: Entry) -> list[Any]:
    """What tells whether the files of a source changed."""
    section = SourceSection(path=entry) if isinstance(entry, str) else entry
    kind, name = section.place()
    if kind in ("path", "array_record"):
        files, paths = find_files(name)
        if "file" in files.protocol:
            return [_file_state(Path(path)) for path in paths]
        return [[path, files.ukey(path)] for path in paths]
    folder = _tfds_folder(section) if kind == "tfds" else Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"data.cache cannot tell whether {source_name(entry)} has changed; save it to a folder "
            f"with save_to_disk and name that, or set data.cache to null"
        )
    return [_file_state(path) for path in sorted(folder.rglob("*")) if path.is_file()]


def _tfds_folder(section: SourceSection) -> Path:
    """Where a prepared data set lies: all of the data folder's files under its name."""
    given = section.data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    assert section.tfds is not None
    return to_path(given) / section.tfds.split("/")[0].split(":")[0]


def _file_state(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]
