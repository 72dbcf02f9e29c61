"""Hugging Face model folders in and out.

Import reads each device's slice from the mapped files into one buffer that becomes the device
array: no second copy of the model exists at any time. Quantized weights of compressed-tensors stay
what they are (`compressed_reader.py`). Export goes tensor by tensor and publishes the folder whole.
What is in a folder is `hf_folder.py`'s subject, config.json is `hf_config.py`'s.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, FLOAT_DTYPES, LogicalRules, ModelConfig
from llama_jax.formats.atomic import atomic_folder
from llama_jax.formats.compressed_reader import abstract_leaf
from llama_jax.formats.gather import check_params, fetch, is_plain
from llama_jax.formats.hf_config import generation_to_hf, read_config, to_hf
from llama_jax.formats.hf_folder import HFFolder, open_folder, read_stored
from llama_jax.formats.safetensors import TensorSpec, parse_bytes, write_sharded
from llama_jax.formats.streaming import Into, Placer
from llama_jax.weights.quantize import Quantization
from llama_jax.weights.table import Weight, abstract_params, weight_table

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
    quantization: Quantization | None = None,
    into: Into | None = None,
) -> tuple[ModelConfig, tree.Tree]:
    """The config and parameters of a Hugging Face folder (Llama, Mistral or Mixtral).

    Without a mesh the arrays lie on the default device. `quantization` quantizes layer by layer
    while reading: `dtype` is then of what is left alone. `into` puts weights elsewhere than on
    devices. `dtype` None takes the dtype config.json declares, as transformers does, or where it
    declares none that of the weight files; the returned config's `dtype` says which it was. Weights
    of compressed-tensors become quantized leaves; a `dtype` for them is refused.
    `rotary_emb.inv_freq` is the only kind of tensor that is skipped.

    Raises ValueError, before anything is allocated, naming all that does not fit.
    """
    wanted = None if dtype is None else float_dtype(dtype)
    source = open_folder(folder)
    if wanted is not None and source.stored and quantization is None:
        raise own_types(wanted, next(iter(source.stored)))
    wanted = wanted or source.declared_dtype
    rows = weight_table(source.config)
    table = {path: row for path, row in rows.items() if path not in source.stored}
    if wanted is None:
        dtypes = {path: _stored_dtype(source, row) for path, row in table.items()}
    else:
        dtypes = dict.fromkeys(table, np.dtype(jnp.dtype(wanted)))
        _report_rounding(source, wanted)
    config = source.config.replace(dtype=wanted or source.config.dtype)
    abstract = tree.unflatten(
        {
            path: jax.ShapeDtypeStruct(row.shape, dtypes[path])
            if path in table
            else abstract_leaf(row, source.stored[path])
            for path, row in rows.items()
        }
    )
    placer = (
        Placer(config, abstract, mesh=mesh, rules=rules, quantization=quantization)
        if into is None
        else into(config, abstract)
    )
    leaves = {
        path: placer.place(row, functools.partial(source.copy_to, row))
        if path in table
        else placer.place_quantized(row, functools.partial(source.copy_array_to, row))
        for path, row in rows.items()
    }
    return config, tree.unflatten(leaves)


def read_abstract(folder: str | Path) -> tuple[ModelConfig, tree.Tree]:
    """What `load_hf` gives, as shape structs, by what config.json says."""
    path = Path(folder)
    config = read_config(path)
    leaves = tree.flatten(abstract_params(config))
    for name, how in read_stored(path, config).items():
        leaves[name] = abstract_leaf(weight_table(config)[name], how)
    return config, tree.unflatten(leaves)


def own_types(dtype: str, path: str) -> ValueError:
    """The refusal of a dtype for a model in which `path` is quantized or adapted."""
    return ValueError(
        f"dtype {dtype} cannot be chosen: {path} is quantized or adapted, and its numbers have "
        f"types of their own; load without dtype"
    )


def _stored_dtype(source: HFFolder, row: Weight) -> np.dtype[Any]:
    stored = source.stored_dtype(row)
    if stored.name not in FLOAT_DTYPES:
        raise ValueError(
            f"{source.path}: {row.path} is stored as {stored}; say which dtype to load "
            f"(dtype='float32', or torch_dtype in config.json)"
        )
    return stored


def _report_rounding(source: HFFolder, wanted: str) -> None:
    """One line in the log when the files hold more bits than are loaded."""
    stored = [dtype for dtype, _ in source.plain_dtypes()]
    wide = [dtype for dtype in stored if dtype.itemsize > jnp.dtype(wanted).itemsize]
    if wide:
        logger.warning(
            "%s: %d of %d tensors are stored as %s and rounded to %s",
            source.path,
            len(wide),
            len(stored),
            "/".join(sorted({d.name for d in wide})),
            wanted,
        )


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
    leaves = check_params(config, params, merge=merge, target="a Hugging Face model folder")
    fallback = np.dtype(jnp.dtype(config.dtype))
    sources: dict[str, tuple[Any, tuple[int, ...]]] = {}
    specs = []
    for row, name, at in in_file_order(config):
        leaf = leaves[row.path]
        kind = target or (np.dtype(leaf.dtype) if is_plain(leaf) else fallback)
        specs.append(TensorSpec(name, kind, row.shape[len(at) :]))
        sources[name] = (leaf, at)
    dtypes = {spec.dtype.name for spec in specs}
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_descriptions(temporary, config, dtypes, tokenizer)
        write_sharded(
            temporary,
            specs,
            lambda spec: fetch(*sources[spec.name], dtype=spec.dtype, name=spec.name),
            max_shard_bytes=max_bytes,
            metadata={"format": "pt"},
        )
    return sorted(path for path in Path(folder).iterdir())


def write_descriptions(
    folder: Path,
    config: ModelConfig,
    dtypes: set[str],
    tokenizer: Any = None,
    *,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Everything in a model folder but the weights, which have these dtypes; `quantization` is what
    config.json says of matrices that are no plain ones.

    Raises ValueError for an architecture that Hugging Face's configuration cannot describe.
    """
    # One dtype is declared; a mixture is left for the reader to find in the files.
    uniform = len(dtypes) == 1
    exported = config.replace(dtype=min(dtypes)) if uniform else config
    described = to_hf(exported, declare_dtype=uniform)
    if quantization is not None:
        described["quantization_config"] = quantization
    _write_json(folder / "config.json", described)
    _write_json(folder / "generation_config.json", generation_to_hf(exported))
    if tokenizer is not None:
        tokenizer.save(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def in_file_order(config: ModelConfig) -> list[tuple[Weight, str, tuple[int, ...]]]:
    """Every tensor, layer by layer, so that a shard holds neighbouring layers."""
    rows = weight_table(config).values()
    tensors = [(row, name, at) for row in rows for name, at in row.hf_names()]
    stacked = [item for item in tensors if item[2]]
    before = [item for item in tensors if not item[2] and item[0].role == "embedding"]
    after = [item for item in tensors if not item[2] and item[0].role != "embedding"]
    return [*before, *sorted(stacked, key=lambda item: item[2][0]), *after]
