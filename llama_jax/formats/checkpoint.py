"""Checkpoints: folders that are models, and that training goes on from.

    checkpoint.json   what the model is, what every leaf is made of, hashes of all other files
    complete.json     the hash of checkpoint.json; written last
    weights/ or trained/ and frozen/   arrays of the parameters
    optimizer/        moments, counters, the run's key (training only)
    tokenizer files

Arrays are written by orbax, whole and in full precision, and can be read onto any mesh. A folder
appears under its name only when it is complete, and is read only when every byte of it is the one
that was written. This is the only file that knows orbax.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from qwix import QArray

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, LogicalRules, ModelConfig
from llama_jax.formats.atomic import atomic_folder
from llama_jax.mesh.sharding import shardings
from llama_jax.weights.tensors import LoraTensor, PackedTensor, SavedTensor

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MARKER = "complete.json"
VERSION = 1

_LEAF_TYPES: dict[str, Any] = {
    cls.__name__: cls for cls in (LoraTensor, SavedTensor, PackedTensor, QArray)
}
_PARAMETER_GROUPS = ("weights", "trained", "frozen")
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A folder that is no checkpoint, not a whole one, or not that of what is asked for."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of which bytes were lost or changed."""


def is_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


# Models


def save_model(
    folder: str | Path,
    config: ModelConfig,
    params: tree.Tree,
    tokenizer: Any,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a model that `load_model` gives back bit for bit; quantized and adapted weights
    too. `tokenizer` may be None."""
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        groups = {"weights": tree.flatten_arrays(params)}
        _write(temporary, config, params, groups, tokenizer=tokenizer, extra={}, linked={})
    return Path(folder)


def load_model(
    folder: str | Path, *, mesh: Mesh | None = None, rules: LogicalRules = DEFAULT_RULES
) -> tuple[ModelConfig, tree.Tree]:
    """The config and parameters in a checkpoint folder, placed on `mesh` or the first device.

    Raises CheckpointError naming the folder, and what is wrong with it.
    """
    folder = Path(folder)
    manifest = verify(folder)
    config = ModelConfig.from_dict(manifest["config"])
    abstract = _abstract_params(manifest)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda a: _struct(a, place), abstract)
    else:
        placed = jax.tree.map(_struct, abstract, shardings(config, abstract, mesh, rules))
    return config, _read_params(folder, manifest, placed)


def read_abstract(folder: str | Path) -> tuple[ModelConfig, tree.Tree]:
    """What `load_model` gives, as shape structs; only the description is read."""
    manifest = _read_manifest(Path(folder))
    return ModelConfig.from_dict(manifest["config"]), _abstract_params(manifest)


# Training


def step_folder(root: str | Path, step: int) -> Path:
    return Path(root) / f"step_{step:08d}"


def list_steps(root: str | Path) -> list[int]:
    """The steps with a checkpoint under `root`, oldest first. Folders without the marker of a
    finished save count as absent."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        match = _STEP.fullmatch(path.name)
        if match and (path / MARKER).is_file():
            found.append(int(match.group(1)))
    return sorted(found)


def latest_step(root: str | Path) -> int | None:
    steps = list_steps(root)
    return steps[-1] if steps else None


def save_train_state(
    root: str | Path,
    step: int,
    *,
    config: ModelConfig,
    params: tree.Tree,
    mask: tree.Tree,
    optimizer: tree.Tree,
    extra: Mapping[str, Any],
    tokenizer: Any,
    keep: int,
    frozen_from: Path | None = None,
) -> Path:
    """Writes `root/step_…` and removes all but the `keep` latest checkpoints.

    mask: which arrays of `params` are trained. optimizer: any tree of arrays. extra: values for
    JSON that come back as they are. frozen_from: an earlier checkpoint of the same run, whose
    frozen arrays are the same: its files are linked instead of written again.
    """
    folder = step_folder(root, step)
    trained, frozen = tree.partition(params, mask)
    groups = {
        "trained": tree.flatten_arrays(trained),
        "frozen": tree.flatten_arrays(frozen),
        "optimizer": tree.flatten_arrays(optimizer),
    }
    with atomic_folder(folder) as temporary:
        linked = {} if frozen_from is None else _link(frozen_from, temporary, "frozen")
        extra = {**extra, "step": step}
        _write(temporary, config, params, groups, tokenizer=tokenizer, extra=extra, linked=linked)
    for old in list_steps(root)[:-keep]:
        shutil.rmtree(step_folder(root, old))
    return folder


def restore_train_state(
    folder: str | Path, *, params: tree.Tree, optimizer: tree.Tree
) -> tuple[tree.Tree, tree.Tree, dict[str, Any]]:
    """(params, optimizer, extra), placed as the shape structs given say, on whatever mesh.

    Raises CheckpointError when the folder is damaged or holds other arrays than those asked for.
    """
    folder = Path(folder)
    manifest = verify(folder)
    stored = _abstract_params(manifest)
    same = jax.tree.structure(stored) == jax.tree.structure(params)  # type: ignore[operator]
    if not same:
        raise CheckpointError(
            f"{folder} holds other parameters than this run trains: "
            f"{_difference(tree.flatten_arrays(stored), tree.flatten_arrays(params))}"
        )
    wanted = tree.flatten_arrays(optimizer)
    held = manifest["groups"].get("optimizer", {})
    if set(held) != set(wanted):
        raise CheckpointError(
            f"{folder} holds another optimizer state than this run needs: "
            f"{_difference(held, wanted)}"
        )
    restored = _read_group(folder, manifest, "optimizer", wanted)
    filled = tree.map_arrays_with_path(lambda path, _: restored[path], optimizer)
    return _read_params(folder, manifest, params), filled, manifest["extra"]


def remove_unfinished(root: str | Path) -> None:
    """Deletes what interrupted saves left under `root`: only folders with their temporary name."""
    if Path(root).is_dir():
        for path in Path(root).glob(".step_*.tmp-*"):
            logger.warning("removing %s, which an interrupted save left", path)
            shutil.rmtree(path)


def set_aside(root: str | Path, step: int) -> Path:
    """Renames a damaged checkpoint so that it is no longer found; nothing is deleted."""
    folder = step_folder(root, step)
    number = 0
    while (aside := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    return folder.rename(aside)


# Integrity


def verify(folder: str | Path) -> dict[str, Any]:
    """Reads every file once and compares it with what was written; returns the manifest.

    Raises CheckpointError naming the folder, and the file that is missing or changed.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    if not (folder / MARKER).is_file():
        raise CheckpointError(
            f"{folder} has no {MARKER}: its save did not finish, or it was copied without that "
            f"file. Nothing was changed. If you know that it is whole, check and accept it with "
            f"llama_jax.formats.checkpoint.accept({str(folder)!r})"
        )
    if (folder / MARKER).read_bytes() != _marker(folder):
        raise _damaged(folder, f"{MARKER} does not fit {MANIFEST}")
    return _check_files(folder)


def accept(folder: str | Path) -> None:
    """Writes the marker that `folder` lacks, after checking every file against the manifest."""
    folder = Path(folder)
    _check_files(folder)
    (folder / MARKER).write_bytes(_marker(folder))


def _check_files(folder: Path) -> dict[str, Any]:
    manifest = _read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"the file {name} is missing")
        if path.stat().st_size != entry["bytes"] or _hash(path) != entry["sha256"]:
            raise _damaged(folder, f"{name} is not the file that was written")
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read: {error}") from error
    if version != VERSION:
        raise CheckpointError(
            f"{folder} was written in version {version!r} of the checkpoint format; this program "
            f"reads version {VERSION}"
        )
    return manifest


def _damaged(folder: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{folder} is damaged: {what}")


def _marker(folder: Path) -> bytes:
    """What the marker of `folder` must hold."""
    return json.dumps({"sha256": _hash(folder / MANIFEST)}).encode() + b"\n"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing


def _write(
    folder: Path,
    config: ModelConfig,
    params: tree.Tree,
    groups: Mapping[str, Mapping[str, Any]],
    *,
    tokenizer: Any,
    extra: Mapping[str, Any],
    linked: Mapping[str, Any],
) -> None:
    if not isinstance(params["layers"], dict):
        raise ValueError("a checkpoint holds stacked layers; save the tree before unstacking it")
    groups = {name: arrays for name, arrays in groups.items() if arrays}
    for name, arrays in groups.items():
        if not any(file.startswith(f"{name}/") for file in linked):
            _write_group(folder / name, arrays)
    if tokenizer is not None:
        tokenizer.save(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = linked.get(name) or {"bytes": path.stat().st_size, "sha256": _hash(path)}
    manifest = {
        "format": "llama-jax checkpoint",
        "version": VERSION,
        "config": config.to_dict(),
        "leaves": {path: _describe(leaf) for path, leaf in tree.flatten(params).items()},
        "groups": {
            name: {
                path: {"shape": list(array.shape), "dtype": str(array.dtype)}
                for path, array in arrays.items()
            }
            for name, arrays in groups.items()
        },
        "extra": dict(extra),
        "files": files,
    }
    _write_json(folder / MANIFEST, manifest)
    (folder / MARKER).write_bytes(_marker(folder))


def _write_group(folder: Path, arrays: Mapping[str, Any]) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays)))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _link(source: Path, target: Path, group: str) -> dict[str, Any]:
    """Links (or, where the file system cannot, copies) the files of a group; their entries."""
    if not (source / group).is_dir():
        return {}
    files = json.loads((source / MANIFEST).read_text(encoding="utf-8"))["files"]
    entries = {name: entry for name, entry in files.items() if name.startswith(f"{group}/")}
    for name in entries:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
    return entries


# What a leaf is made of


def _describe(leaf: Any) -> Any:
    """A JSON description of a weight leaf without its arrays: "array", None for an absent part,
    or the type with its static fields and parts."""
    if leaf is None:
        return None
    if type(leaf).__name__ not in _LEAF_TYPES:
        return "array"
    static, parts = {}, {}
    for spec in dataclasses.fields(leaf):
        value = getattr(leaf, spec.name)
        if not _is_static(spec):
            parts[spec.name] = _describe(value)
        elif isinstance(leaf, QArray):
            static[spec.name] = str(jnp.dtype(value))
        else:
            static[spec.name] = value
    return {"type": type(leaf).__name__, "static": static, "parts": parts}


def _is_static(spec: dataclasses.Field[Any]) -> bool:
    return bool(spec.metadata.get("static")) or spec.metadata.get("pytree_node") is False


def _build(description: Any, path: str, arrays: Mapping[str, Any]) -> Any:
    """The leaf that `_describe` described, around `arrays`."""
    if description is None:
        return None
    if description == "array":
        return arrays[path]
    parts = {
        name: _build(part, f"{path}.{name}", arrays) for name, part in description["parts"].items()
    }
    static = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["static"].items()
    }
    if description["type"] == "QArray":
        static["qtype"] = jnp.dtype(static["qtype"])
    return _LEAF_TYPES[description["type"]](**parts, **static)


# Reading


def _abstract_params(manifest: Mapping[str, Any]) -> tree.Tree:
    structs = {
        path: jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
        for group in _PARAMETER_GROUPS
        for path, entry in manifest["groups"].get(group, {}).items()
    }
    leaves = manifest["leaves"].items()
    return tree.unflatten({path: _build(leaf, path, structs) for path, leaf in leaves})


def _read_params(folder: Path, manifest: Mapping[str, Any], placed: tree.Tree) -> tree.Tree:
    wanted = tree.flatten_arrays(placed)
    arrays: dict[str, Any] = {}
    for group in _PARAMETER_GROUPS:
        held = manifest["groups"].get(group, {})
        arrays |= _read_group(folder, manifest, group, {path: wanted[path] for path in held})
    leaves = manifest["leaves"].items()
    return tree.unflatten({path: _build(leaf, path, arrays) for path, leaf in leaves})


def _read_group(
    folder: Path, manifest: Mapping[str, Any], group: str, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The arrays of a group, each straight to the place its shape struct names."""
    if not wanted:
        return {}
    for path, struct in wanted.items():
        entry = manifest["groups"][group][path]
        if tuple(entry["shape"]) != struct.shape or entry["dtype"] != str(struct.dtype):
            raise CheckpointError(
                f"{folder}: {path} is {entry['dtype']} {tuple(entry['shape'])}, but this run needs "
                f"{struct.dtype} {struct.shape}"
            )
    how = {
        path: ocp.ArrayRestoreArgs(
            sharding=struct.sharding, dtype=struct.dtype, global_shape=struct.shape
        )
        for path, struct in wanted.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=how)
        return reader.restore((folder / group).absolute(), args=args)


def _struct(array: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def _difference(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    missing, extra = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    parts = []
    for word, names in (("missing", missing), ("not needed", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{word}: {', '.join(names[:3])}{more}")
    return "; ".join(parts) or "the leaves differ in rank, scale rule or number format"
