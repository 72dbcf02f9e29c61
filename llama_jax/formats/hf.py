"""Hugging Face model folders in and out.

Import reads each device's slice from the mapped files into one buffer that becomes the device
array: no second copy of the model exists at any time. Export goes tensor by tensor and publishes
the folder whole. What is in a folder is `hf_folder.py`'s subject, config.json is `hf_config.py`'s.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, FLOAT_DTYPES, LogicalRules, ModelConfig
from llama_jax.formats.atomic import atomic_folder
from llama_jax.formats.hf_config import generation_to_hf, to_hf
from llama_jax.formats.hf_folder import HFFolder, open_folder
from llama_jax.formats.placement import place
from llama_jax.formats.safetensors import TensorSpec, convert, parse_bytes, write_sharded
from llama_jax.mesh.sharding import replicated, shardings
from llama_jax.weights.table import Weight, abstract_params, weight_table
from llama_jax.weights.tensors import LoraTensor, is_quantized, to_array

logger = logging.getLogger(__name__)


def float_dtype(dtype: Any) -> str:
    """The canonical name of one of the dtypes weights may have."""
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(FLOAT_DTYPES)}")
    return name


def load_hf(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: LogicalRules = DEFAULT_RULES,
    dtype: Any = None,
) -> tuple[ModelConfig, tree.Tree]:
    """The config and parameters of a Hugging Face folder (Llama, Mistral or Mixtral).

    Without a mesh the arrays lie on the default device. `dtype` None takes the dtype config.json
    declares, as transformers does, or where it declares none that of the weight files; the
    returned config's `dtype` says which it was. `rotary_emb.inv_freq` is the only kind of tensor
    that is skipped.

    Raises ValueError, before anything is allocated, naming all that does not fit.
    """
    source = open_folder(folder)
    wanted = float_dtype(dtype) if dtype is not None else source.declared_dtype
    table = weight_table(source.config)
    dtypes = {path: _target_dtype(source, row, wanted) for path, row in table.items()}
    config = source.config.replace(dtype=wanted or source.config.dtype)
    places: dict[str, NamedSharding | None] = dict.fromkeys(table)
    if mesh is not None:
        places = tree.flatten(shardings(config, abstract_params(config), mesh, rules))
    leaves = {}
    for path, row in table.items():
        read = functools.partial(source.copy_to, row)
        leaves[path] = place(row.shape, dtypes[path], read, places[path])
    return config, tree.unflatten(leaves)


def _target_dtype(source: HFFolder, row: Weight, wanted: str | None) -> np.dtype[Any]:
    if wanted is None:
        stored = source.stored_dtype(row)
        if stored.name not in FLOAT_DTYPES:
            raise ValueError(
                f"{source.path}: {row.path} is stored as {stored}; say which dtype to load "
                f"(dtype='float32')"
            )
        return stored
    target = np.dtype(jnp.dtype(wanted))
    for name, _ in row.hf_names():
        stored = source.tensors[name].header.tensors[name].dtype
        if stored.itemsize > target.itemsize:
            logger.warning(
                "%s: %s is stored as %s and rounded to %s", source.path, name, stored, target
            )
            break
    return target


def save_hf(
    folder: str | Path,
    config: ModelConfig,
    params: tree.Tree,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    merge: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Writes a folder that transformers loads, and returns its files.

    `dtype` None keeps every weight's own. Adapters and quantized weights have no place in such a
    folder: `merge=True` writes the full matrices they stand for, anything else is refused. The
    tokenizer's files and chat template are written beside the weights where one is given.

    The folder appears under its name only when all of it is on the disk. An existing folder that
    is not empty is refused unless `overwrite`. Parameters may be sharded; one tensor at a time is
    gathered.
    """
    target = None if dtype is None else np.dtype(jnp.dtype(float_dtype(dtype)))
    max_bytes = parse_bytes(max_shard_size)
    leaves = _check_params(config, params, merge=merge)
    fallback = np.dtype(jnp.dtype(config.dtype))
    sources: dict[str, tuple[Any, tuple[int, ...]]] = {}
    specs = []
    for row, name, at in _in_file_order(config):
        leaf = leaves[row.path]
        kind = target or (np.dtype(leaf.dtype) if _is_plain(leaf) else fallback)
        specs.append(TensorSpec(name, kind, row.shape[len(at) :]))
        sources[name] = (leaf, at)
    # One dtype is declared; a mixture is left for the reader to find in the files.
    dtypes = {spec.dtype.name for spec in specs}
    uniform = len(dtypes) == 1
    exported = config.replace(dtype=min(dtypes)) if uniform else config
    description = to_hf(exported, declare_dtype=uniform)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        _write_json(temporary / "config.json", description)
        _write_json(temporary / "generation_config.json", generation_to_hf(exported))
        if tokenizer is not None:
            tokenizer.save(temporary)
        write_sharded(
            temporary,
            specs,
            lambda spec: _fetch(*sources[spec.name], spec),
            max_shard_bytes=max_bytes,
            metadata={"format": "pt"},
        )
    return sorted(path for path in Path(folder).iterdir())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_file_order(config: ModelConfig) -> list[tuple[Weight, str, tuple[int, ...]]]:
    """Every tensor, layer by layer, so that a shard holds neighbouring layers."""
    rows = weight_table(config).values()
    tensors = [(row, name, at) for row in rows for name, at in row.hf_names()]
    stacked = [item for item in tensors if item[2]]
    before = [item for item in tensors if not item[2] and item[0].role == "embedding"]
    after = [item for item in tensors if not item[2] and item[0].role != "embedding"]
    return [*before, *sorted(stacked, key=lambda item: item[2][0]), *after]


def _is_plain(leaf: Any) -> bool:
    return not isinstance(leaf, LoraTensor) and not is_quantized(leaf)


def _check_params(config: ModelConfig, params: tree.Tree, *, merge: bool) -> dict[str, Any]:
    if isinstance(params.get("layers"), list | tuple):
        raise ValueError("params hold one tree per layer; export takes the stacked layers")
    leaves = tree.flatten(params)
    table = weight_table(config)
    problems = [f"{path} is missing" for path in table if path not in leaves]
    for path, leaf in leaves.items():
        if path not in table:
            problems.append(f"{path} is unexpected")
        elif tuple(leaf.shape) != table[path].shape:
            problems.append(f"{path} has shape {leaf.shape}, expected {table[path].shape}")
        elif not _is_plain(leaf):
            if not merge:
                kind = "an adapter" if isinstance(leaf, LoraTensor) else "quantized weights"
                raise ValueError(
                    f"{path} holds {kind}, which a Hugging Face model folder cannot; pass "
                    f"merge=True to write the full matrices, or export the adapter as PEFT"
                )
        elif np.dtype(leaf.dtype).name not in FLOAT_DTYPES:
            problems.append(f"{path} is {leaf.dtype}, allowed are {', '.join(FLOAT_DTYPES)}")
        if any(
            isinstance(array, jax.Array) and not array.is_fully_addressable
            for array in jax.tree.leaves(leaf)
        ):
            raise ValueError(
                f"{path} is spread over several processes; save a checkpoint from there and export "
                f"it from one process"
            )
    if problems:
        raise ValueError(f"params do not fit the config: {'; '.join(problems[:20])}")
    return leaves


def _fetch(leaf: Any, at: tuple[int, ...], spec: TensorSpec) -> np.ndarray:
    """One tensor on the host, in the dtype to write."""
    tensor = jax.tree.map(lambda array: _take(array, at), leaf)
    if not _is_plain(leaf):
        return np.asarray(to_array(jax.tree.map(jnp.asarray, tensor), dtype=spec.dtype))
    return convert(tensor, spec.dtype, name=spec.name)


def _take(array: Any, at: tuple[int, ...]) -> np.ndarray:
    # Part of a quantized stack, such as a scale that all layers share, can have length 1.
    at = tuple(0 if size == 1 else i for i, size in zip(at, array.shape, strict=False))
    if isinstance(array, jax.Array) and len(array.sharding.device_set) > 1:
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)
        return np.asarray(_gatherer(sharding.mesh, len(at))(array, at))
    if isinstance(array, jax.Array) and jax.default_backend() != "cpu":
        return np.asarray(_gatherer(None, len(at))(array, at))
    return np.asarray(array)[at]


@functools.cache
def _gatherer(mesh: Mesh | None, num_indices: int) -> Any:
    """A jitted `array[at]` whose result every device holds; compiled once for each shape."""

    def take(array: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
        for i in at:
            array = jax.lax.dynamic_index_in_dim(array, i, axis=0, keepdims=False)
        return array

    return jax.jit(take, out_shardings=None if mesh is None else replicated(mesh))
