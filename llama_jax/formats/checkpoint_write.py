"""What a checkpoint holds beside its arrays: description, tokenizer, linked files, marker."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats import checkpoint_leaves as leaves
from llama_jax.formats.checkpoint_arrays import owned_files
from llama_jax.formats.checkpoint_files import (
    MANIFEST,
    describe_files,
    file_names,
    write_manifest,
)
from llama_jax.mesh.distributed import agreed, is_main

# Where a process says what it wrote, for process 0 to gather.
_PART = ".files-"


def describe(
    config: ModelConfig,
    params: tree.Tree,
    groups: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The description of a checkpoint, its files apart. Groups without arrays are left out."""
    if not isinstance(params["layers"], dict):
        raise ValueError("a checkpoint holds stacked layers; save the tree before unstacking it")
    return {
        "config": config.to_dict(),
        "leaves": {path: leaves.describe(leaf) for path, leaf in tree.flatten(params).items()},
        "groups": {
            name: {
                path: {"shape": list(array.shape), "dtype": str(array.dtype)}
                for path, array in arrays.items()
            }
            for name, arrays in groups.items()
            if arrays
        },
        "extra": dict(extra),
    }


def write_rest(
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    turn: str,
    tokenizer: Any,
    frozen_from: Path | None = None,
) -> None:
    """Everything behind the arrays, the marker last. Every process hashes what it wrote.

    turn: a name for these processes' agreement, new in each call. tokenizer: may be None.
    frozen_from: the checkpoint to link the group `frozen` from.
    """
    linked: dict[str, Any] = {}
    with agreed(f"{turn}/beside the arrays"):
        if is_main():
            if frozen_from is not None:
                linked = _link(frozen_from, folder, "frozen")
            if tokenizer is not None:
                tokenizer.save(folder)
    process, count = jax.process_index(), jax.process_count()
    with agreed(f"{turn}/hashed"):
        names = [name for name in file_names(folder) if not name.startswith(_PART)]
        if frozen_from is not None:
            names = [name for name in names if not name.startswith("frozen/")]
        entries = describe_files(folder, owned_files(names, process, count))
        if not is_main():
            part = folder / f"{_PART}{process}.json"
            part.write_text(json.dumps(entries), encoding="utf-8")
    if is_main():
        for other in range(1, count):
            part = folder / f"{_PART}{other}.json"
            entries |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        files = dict(sorted({**entries, **linked}.items()))
        write_manifest(folder, {**manifest, "files": files})


def _link(source: Path, target: Path, group: str) -> dict[str, Any]:
    """Links (or, where the file system cannot, copies) the files of a group; their entries."""
    files = json.loads((source / MANIFEST).read_text(encoding="utf-8"))["files"]
    entries = {name: entry for name, entry in files.items() if name.startswith(f"{group}/")}
    for name in entries:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
    return entries
