"""Versions of models on a disk: models/NAME/VERSION/ with a manifest, never changed once written.

A version folder holds `manifest.json`, the model under `model/` (a folder or one .gguf file) and,
where there are any, an adapter under `adapter/` and a chat template in `template.jinja`. Adapters
that are loaded beside a model lie in models/NAME/adapters/ADAPTER/. Which version answers is in
models/NAME/state.json.

Names are looked up among the folders that are there; nothing a client sends becomes a path.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.config import check_keys
from llama_jax.formats.json_fields import is_equal, parse_json, shorten

MANIFEST, STATE, ADAPTERS = "manifest.json", "state.json", "adapters"
_RESERVED = (STATE, ADAPTERS)  # what lies beside a model's versions
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHUNK = 1 << 20

Kind = tuple[str, tuple[type, ...]]
_TEXT: Kind = ("a text", (str,))
_TEXT_OR_NULL: Kind = ("a text or null", (str, type(None)))
_WHOLE: Kind = ("a whole number", (int,))
_MANIFEST_KINDS: dict[str, Kind] = {
    "name": _TEXT,
    "version": _TEXT,
    "model": _TEXT,
    "adapter": _TEXT_OR_NULL,
    "template": _TEXT_OR_NULL,
    "source": _TEXT,
    "quantization": _TEXT_OR_NULL,
    "created": _WHOLE,
    "files": ("an object", (dict,)),
}
_FILE_KINDS: dict[str, Kind] = {"bytes": _WHOLE, "sha256": _TEXT}
_STATE_KINDS: dict[str, Kind] = {
    "active": _TEXT_OR_NULL,
    "previous": ("a list", (list,)),
    "canary": _TEXT_OR_NULL,
    "share": ("a number", (int, float)),
}


class UnknownNameError(LookupError):
    """No model, version or adapter is called so."""


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a version is. model, adapter, template: paths in the version's folder.

    source: where it came from, in words. quantization: the types that quantized weights are stored
    in, None where there are none. created: seconds since 1970.
    """

    name: str
    version: str
    model: str
    adapter: str | None
    template: str | None
    source: str
    quantization: str | None
    created: int
    files: dict[str, FileEntry]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises ValueError naming the file and what is wrong with it."""
        path = folder / MANIFEST
        try:
            values = parse_json(path.read_text(encoding="utf-8"), unique=True)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict) or not is_equal(values.pop("format", None), FORMAT):
            raise ValueError(f"{path} is no manifest of format {FORMAT}")
        _check_fields(str(path), values, _MANIFEST_KINDS)
        entries = {}
        for name, entry in values.pop("files").items():
            _check_inside(path, name)
            _check_fields(f"{path}: {name}", entry, _FILE_KINDS)
            entries[name] = FileEntry(**entry)
        manifest = cls(**values, files=entries)
        for name in (manifest.model, manifest.adapter, manifest.template):
            if name is not None:
                _check_inside(path, name)
        return manifest

    def write(self, folder: Path) -> None:
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class State:
    """Which version answers. previous: those that did before, the latest last. canary: a version
    that gets `share` of the requests."""

    active: str | None = None
    previous: tuple[str, ...] = ()
    canary: str | None = None
    share: float = 0.0

    @classmethod
    def from_json(cls, values: Any) -> "State":
        """Raises ValueError."""
        _check_fields("the state", values, _STATE_KINDS)
        for version in values["previous"]:
            if not isinstance(version, str) or not NAME.fullmatch(version):
                raise ValueError(f"previous has {shorten(version)}, which is no version")
        if not 0 <= values["share"] <= 1:
            raise ValueError(f"share is {shorten(values['share'])}; it must be from 0 to 1")
        return cls(**{**values, "previous": tuple(values["previous"])})


def _check_fields(owner: str, values: Any, kinds: dict[str, Kind]) -> None:
    """Raises ValueError unless `values` is an object of these fields, each of its kind."""
    if not isinstance(values, dict):
        raise ValueError(f"{owner} is {shorten(values)}; it must be an object")
    check_keys(owner, values, list(kinds))
    missing = [name for name in kinds if name not in values]
    if missing:
        raise ValueError(f"{owner} lacks {', '.join(missing)}")
    for name, (words, allowed) in kinds.items():
        if type(values[name]) not in allowed:  # True is an int for isinstance
            raise ValueError(f"{owner}: {name} is {shorten(values[name])}; it must be {words}")


def _check_inside(path: Path, name: Any) -> None:
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path} names {name!r}, which is no path inside its folder")


class Registry:
    """The models under `root`. Methods may be called from any thread."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"models_dir {self.root} is no folder")

    def names(self) -> list[str]:
        return [name for name in _folders(self.root) if self.versions(name)]

    def versions(self, name: str) -> list[str]:
        """Those with a manifest; empty for an unknown name."""
        if name not in _folders(self.root):
            return []
        folder = self.root / name
        return [
            version
            for version in _folders(folder)
            if version not in _RESERVED and (folder / version / MANIFEST).is_file()
        ]

    def adapters(self, name: str) -> dict[str, Path]:
        """Folders of the adapters that may be loaded beside a model."""
        if name not in _folders(self.root):
            return {}
        folder = self.root / name / ADAPTERS
        return {each: folder / each for each in _folders(folder)} if folder.is_dir() else {}

    def folder(self, name: str, version: str) -> Path:
        """Raises UnknownNameError."""
        if version not in self.versions(name):
            known = self.versions(name)
            raise UnknownNameError(
                f"model {name!r} has no version {version!r} (it has {', '.join(known)})"
                if known
                else f"there is no model {name!r}"
            )
        return self.root / name / version

    def manifest(self, name: str, version: str) -> Manifest:
        """Raises UnknownNameError, ValueError."""
        folder = self.folder(name, version)
        manifest = Manifest.read(folder)
        if (manifest.name, manifest.version) != (name, version):
            raise ValueError(
                f"{folder / MANIFEST} is of {manifest.name} version {manifest.version}; "
                f"the folder was moved or copied"
            )
        return manifest

    def verify(self, name: str, version: str, *, hashes: bool) -> Manifest:
        """The manifest, after every file it lists was found whole, and no other. Raises ValueError
        naming the first file that is missing, not listed, a link, of another size or (with
        `hashes`) of other contents."""
        folder, manifest = self.folder(name, version), self.manifest(name, version)
        for path in _contents(folder):
            if path.relative_to(folder).as_posix() not in (MANIFEST, *manifest.files):
                raise ValueError(
                    f"{path} is not in the manifest, and versions never change; remove it, or "
                    f"register a version that has it"
                )
        for relative, entry in manifest.files.items():
            path = folder / relative
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            size = path.stat().st_size
            if size != entry.bytes:
                raise ValueError(f"{path} has {size} bytes, the manifest says {entry.bytes}")
        for relative, entry in manifest.files.items():
            if hashes and _sha256(folder / relative) != entry.sha256:
                raise ValueError(f"{folder / relative} is not what the manifest says (SHA-256)")
        return manifest

    def state(self, name: str) -> State:
        """A model with one version answers with it before anyone has activated any. Raises
        ValueError naming a file that is damaged, or whose active version is not there."""
        versions = self.versions(name)
        path = self.root / name / STATE
        if not versions or not path.is_file():
            return State(active=versions[0] if len(versions) == 1 else None)
        try:
            state = State.from_json(parse_json(path.read_text(encoding="utf-8"), unique=True))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged: {error}; activate a version, which writes it anew"
            ) from error
        if state.active not in (None, *versions):
            raise ValueError(
                f"{path} says that {state.active!r} is active, which is not there (there is "
                f"{', '.join(versions)}); activate another"
            )
        return state

    def set_state(self, name: str, state: State) -> None:
        """On the disk at once, or not at all."""
        if not self.versions(name):
            raise UnknownNameError(f"there is no model {name!r}")
        folder = self.root / name
        descriptor, temporary = tempfile.mkstemp(prefix=".state-", dir=folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(state), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(folder / STATE)
        except BaseException:
            Path(temporary).unlink()
            raise


def register(
    root: str | Path,
    name: str,
    version: str,
    model: Path,
    *,
    source: str,
    quantization: str | None = None,
    adapter: Path | None = None,
    template: Path | None = None,
) -> Path:
    """Copies a model (a folder or a .gguf file) into the registry as a new version.

    The folder appears whole or not at all, and its files are made read-only. Raises ValueError for
    a name that is not allowed and a version that exists.
    """
    for what, text in (("name", name), ("version", version)):
        if not NAME.fullmatch(text) or text in _RESERVED:
            raise ValueError(
                f"the {what} {text!r} must be 1 to 64 letters, digits, dots, dashes and "
                f"underscores, beginning with a letter or digit, and not {' or '.join(_RESERVED)}"
            )
    target = Path(root) / name / version
    if target.exists():
        raise ValueError(f"{target} exists; versions never change, so choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{version}.tmp-", dir=target.parent))
    try:
        model_path = _copy(model, temporary / "model")
        adapter_path = None if adapter is None else _copy(adapter, temporary / "adapter")
        if template is not None:
            shutil.copyfile(template, temporary / "template.jinja")
        files = _contents(temporary)
        Manifest(
            name=name,
            version=version,
            model=model_path.relative_to(temporary).as_posix(),
            adapter=None if adapter_path is None else "adapter",
            template=None if template is None else "template.jinja",
            source=source,
            quantization=quantization,
            created=int(time.time()),
            files={
                path.relative_to(temporary).as_posix(): FileEntry(
                    path.stat().st_size, _sha256(path)
                )
                for path in files
            },
        ).write(temporary)
        for path in (*files, temporary / MANIFEST):
            path.chmod(0o444)
        temporary.chmod(0o755)
        _keep_active(Registry(root), name)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _keep_active(registry: Registry, name: str) -> None:
    """The only version goes on answering when there are more, on servers that start then too."""
    versions = registry.versions(name)
    if len(versions) == 1 and not (registry.root / name / STATE).exists():
        registry.set_state(name, State(active=versions[0]))


def _copy(source: Path, target: Path) -> Path:
    """The copy: a folder, or the one file in it."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        return target
    target.mkdir()
    return Path(shutil.copyfile(source, target / source.name))


def _contents(folder: Path) -> list[Path]:
    """The files below a folder. Raises ValueError for a link, or what else is neither."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a link or no file; a version has files of its own only")
    return [path for path in paths if not path.is_dir()]


def _folders(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if NAME.fullmatch(entry.name) and entry.is_dir()
        )
    return []


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
