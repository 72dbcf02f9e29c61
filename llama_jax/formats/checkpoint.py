"""Checkpoints: folders that are models, and that training goes on from.

    checkpoint.json   what the model is, what every leaf is made of, hashes of all other files
    complete.json     the hash of checkpoint.json; written last
    weights/ or trained/ and frozen/   arrays of the parameters
    optimizer/        moments, counters, the run's key (training only)
    tokenizer files

Arrays are written by orbax, whole and in full precision, and can be read onto any mesh, by any
number of processes. A folder appears under its name only when it is complete, and is read only
when every byte of it is the one that was written. Here are models, and reading; `checkpoint_saver`
writes those of a run, `checkpoint_files` knows what is whole.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, LogicalRules, ModelConfig
from llama_jax.formats.atomic import atomic_folder
from llama_jax.formats.checkpoint_arrays import ArrayWriter, read_group
from llama_jax.formats.checkpoint_files import (
    MANIFEST,
    MARKER,
    CheckpointError,
    DamagedCheckpointError,
    accept,
    is_checkpoint,
    read_manifest,
    verify,
    verify_together,
)
from llama_jax.formats.checkpoint_leaves import PARAMETER_GROUPS, abstract_params, build
from llama_jax.formats.checkpoint_steps import (
    find_newest,
    latest_step,
    list_steps,
    remove_unfinished,
    set_aside,
    step_folder,
)
from llama_jax.formats.checkpoint_write import describe, write_rest
from llama_jax.formats.streaming import DiskPlacer, Into, Placer
from llama_jax.mesh.sharding import shardings
from llama_jax.weights.quantize import Quantization

__all__ = [
    "MANIFEST",
    "MARKER",
    "CheckpointError",
    "DamagedCheckpointError",
    "accept",
    "find_newest",
    "is_checkpoint",
    "latest_step",
    "list_steps",
    "load_model",
    "read_abstract",
    "remove_unfinished",
    "restore_train_state",
    "save_model",
    "save_streamed",
    "set_aside",
    "step_folder",
    "verify",
]

_reads = itertools.count()

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
    too. `tokenizer` may be None. For one process."""
    if jax.process_count() > 1:
        raise ValueError("save_model writes from one process; several save a run's checkpoints")
    arrays = tree.flatten_arrays(params)
    manifest = describe(config, params, {"weights": arrays}, {})
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / "weights").mkdir()
        writer = ArrayWriter(temporary / "weights", arrays)
        writer.wait()
        writer.finish()
        writer.close()
        write_rest(temporary, manifest, turn="model", tokenizer=tokenizer)
    return Path(folder)


def save_streamed(
    folder: str | Path,
    load: Callable[[Into], tuple[ModelConfig, tree.Tree, Any]],
    *,
    quantization: Quantization | None = None,
    overwrite: bool = False,
) -> tuple[ModelConfig, tree.Tree]:
    """As `save_model` of what `load` gives (config, parameters, tokenizer), quantized on request,
    with no more than a piece of a weight in memory. `load` must put its weights into what it is
    handed. Returns the config and shape structs of the parameters. For one process."""
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / "weights").mkdir()
        into = functools.partial(DiskPlacer, temporary / "weights", quantization=quantization)
        config, params, tokenizer = load(into)
        arrays = tree.flatten_arrays(params)
        assert not any(isinstance(array, jax.Array) for array in arrays.values())
        manifest = describe(config, params, {"weights": arrays}, {})
        write_rest(temporary, manifest, turn="model", tokenizer=tokenizer)
    return config, params


def load_model(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: LogicalRules = DEFAULT_RULES,
    quantization: Quantization | None = None,
    into: Into | None = None,
) -> tuple[ModelConfig, tree.Tree]:
    """The config and parameters in a checkpoint folder, placed on `mesh` or the first device. All
    processes of a mesh call it alike. `quantization` quantizes one weight after the other, `into`
    puts them elsewhere than on devices.

    Raises CheckpointError naming the folder, and what is wrong with it.
    """
    folder = Path(folder)
    spread = mesh is not None and mesh.is_multi_process
    manifest = _verify_together(folder) if spread else verify(folder)
    config = ModelConfig.from_dict(manifest["config"])
    abstract = abstract_params(manifest)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda a: _struct(a, place), abstract)
    else:
        placed = jax.tree.map(_struct, abstract, shardings(config, abstract, mesh, rules))
    if into is not None:
        return config, _read_each(folder, manifest, placed, into(config, abstract))
    if quantization is None:
        return config, _read_params(folder, manifest, placed)
    placer = Placer(config, abstract, mesh=mesh, rules=rules, quantization=quantization)
    return config, _read_each(folder, manifest, placed, placer)


def _read_each(
    folder: Path,
    manifest: Mapping[str, Any],
    placed: tree.Tree,
    placer: Placer | DiskPlacer,
) -> tree.Tree:
    """As `_read_params`, one weight at a time."""
    leaves = {}
    for path, leaf in tree.flatten(placed).items():
        wanted = tree.flatten_arrays(tree.unflatten({path: leaf}))
        arrays: dict[str, Any] = {}
        for group in PARAMETER_GROUPS:
            held = manifest["groups"].get(group, {})
            part = {name: wanted[name] for name in held if name in wanted}
            arrays |= read_group(folder, manifest, group, part)
        leaves[path] = placer.finish(path, build(manifest["leaves"][path], path, arrays))
    return tree.unflatten(leaves)


def read_abstract(folder: str | Path) -> tuple[ModelConfig, tree.Tree]:
    """What `load_model` gives, as shape structs; only the description is read."""
    manifest = read_manifest(Path(folder))
    return ModelConfig.from_dict(manifest["config"]), abstract_params(manifest)


# Training


def restore_train_state(
    folder: str | Path,
    *,
    params: tree.Tree,
    optimizer: tree.Tree,
    manifest: Mapping[str, Any] | None = None,
) -> tuple[tree.Tree, tree.Tree, dict[str, Any]]:
    """(params, optimizer, extra), placed as the shape structs given say, on whatever mesh. All
    processes of a run call it alike.

    manifest: from `find_newest`, which has checked the folder; None: it is checked here.

    Raises CheckpointError when the folder is damaged or holds other arrays than those asked for.
    """
    folder = Path(folder)
    if manifest is None:
        manifest = _verify_together(folder)
    stored = abstract_params(manifest)
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
    restored = read_group(folder, manifest, "optimizer", wanted)
    filled = tree.map_arrays_with_path(lambda path, _: restored[path], optimizer)
    return _read_params(folder, manifest, params), filled, manifest["extra"]


def _verify_together(folder: Path) -> dict[str, Any]:
    return verify_together(folder, f"verify/{next(_reads)}")


def _read_params(folder: Path, manifest: Mapping[str, Any], placed: tree.Tree) -> tree.Tree:
    wanted = tree.flatten_arrays(placed)
    arrays: dict[str, Any] = {}
    for group in PARAMETER_GROUPS:
        held = manifest["groups"].get(group, {})
        arrays |= read_group(folder, manifest, group, {path: wanted[path] for path in held})
    leaves = manifest["leaves"].items()
    return tree.unflatten({path: build(leaf, path, arrays) for path, leaf in leaves})


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
