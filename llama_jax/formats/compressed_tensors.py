"""Quantized models as Hugging Face folders that vLLM and transformers read: compressed-tensors.

config.json says in `quantization_config` what the matrices hold; `compressed_kind.py` says how:

    int8-dynamic, int8-static                   int-quantized
    fp8, fp8-dynamic, fp8-static                float-quantized
    int8, int4, int4-dynamic, int4-static       pack-quantized

`weight_scale` is float32. Readers make scales of tokens themselves, and may divide by 127.5 where
this project divides by 127. The format is that of the package compressed-tensors
(https://github.com/vllm-project/compressed-tensors), which the tests read it with.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from qwix import QArray

from llama_jax import tree
from llama_jax.config import FLOAT_DTYPES, ModelConfig
from llama_jax.formats.atomic import atomic_folder
from llama_jax.formats.compressed_kind import HIGH_BITS, METHOD, PACKED_FORMAT, Kind
from llama_jax.formats.gather import check_whole, fetch, is_plain, take
from llama_jax.formats.hf import in_file_order, write_descriptions
from llama_jax.formats.safetensors import TensorSpec, parse_bytes, write_sharded
from llama_jax.weights.adapted import is_adapted
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import IntegerTensor, PackedTensor, RoundedInputs
from llama_jax.weights.table import Weight

_TARGET = "a compressed-tensors folder"


def save_compressed(
    folder: str | Path,
    config: ModelConfig,
    params: tree.Tree,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> list[Path]:
    """Writes the folder and returns its files; what is not quantized keeps its dtype.

    Raises ValueError for a model without quantized weights, for adapters, for a quantized embedding
    and quantized experts, for nf4, for matrices quantized in different ways, and for a last tile
    that is shorter than the others.
    """
    leaves = check_whole(config, params, target=_TARGET)
    kinds = {path: _kind(path, leaf) for path, leaf in leaves.items() if not is_plain(leaf)}
    if not kinds:
        raise ValueError("no weight is quantized; write the model with --format hf")
    kind = _only_kind(kinds, {path: leaf.shape[-1] for path, leaf in leaves.items()})
    for path, leaf in leaves.items():
        if path not in kinds and np.dtype(leaf.dtype).name not in FLOAT_DTYPES:
            raise ValueError(f"{path} is {leaf.dtype}, allowed are {', '.join(FLOAT_DTYPES)}")
    specs: list[TensorSpec] = []
    made: dict[str, tuple[_Row, str]] = {}
    ignored = ["lm_head"] if "lm_head.weight" not in kinds else []
    for row, name, at in in_file_order(config):
        leaf, place = leaves[row.path], _Row(row, name, at)
        if row.path not in kinds:
            specs.append(TensorSpec(name, np.dtype(leaf.dtype), row.shape[len(at) :]))
            made[name] = (place, "plain")
            if row.role == "matrix":
                ignored.append(name.removesuffix(".weight"))
            continue
        for part, dtype, shape in _parts(leaf, kind, row.shape[len(at) :]):
            full = f"{name.removesuffix('.weight')}.{part}"
            specs.append(TensorSpec(full, np.dtype(dtype), shape))
            made[full] = (place, part)

    def values(spec: TensorSpec) -> np.ndarray:
        place, part = made[spec.name]
        leaf = leaves[place.row.path]
        if part == "plain":
            return fetch(leaf, place.at, dtype=spec.dtype, name=spec.name)
        return _values(take(leaf, place.at), part, kind).reshape(spec.shape)

    plain = {np.dtype(leaf.dtype).name for path, leaf in leaves.items() if path not in kinds}
    described = {
        "quant_method": METHOD,
        "format": kind.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": kind.to_config()},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_descriptions(temporary, config, plain, tokenizer, quantization=described)
        write_sharded(
            temporary,
            specs,
            values,
            max_shard_bytes=parse_bytes(max_shard_size),
            metadata={"format": "pt"},
        )
    return sorted(Path(folder).iterdir())


@dataclass(frozen=True)
class _Row:
    """A tensor of the file: its row of the weight table, its name, and where in the stack it is."""

    row: Weight
    name: str
    at: tuple[int, ...]


def _kind(path: str, leaf: Leaf) -> Kind:
    if is_adapted(leaf):
        raise ValueError(
            f"{path} holds an adapter, which {_TARGET} cannot; merge it first, with "
            f"`export --format hf --merge`, and quantize the result"
        )
    if not path.startswith("layers.") and path != "lm_head.weight":
        raise ValueError(
            f"{path} is quantized, but readers of compressed-tensors take linear layers alone; "
            f"quantize without --all"
        )
    if ".block_sparse_moe." in path:
        raise ValueError(
            f"{path} is quantized, but its readers have no experts as linear layers; skip them, "
            f"or export with --format hf --merge"
        )
    activations = None
    if isinstance(leaf, RoundedInputs):
        if isinstance(leaf, IntegerTensor) and leaf.is_tiled:
            raise ValueError(
                f"{path} is multiplied tile by tile, with scales of activations that "
                f"compressed-tensors does not have; quantize without --tile"
            )
        activations = "dynamic" if leaf.activation_scale is None else "static"
        leaf = leaf.base
    if isinstance(leaf, PackedTensor):
        if leaf.codebook != "int4":
            raise ValueError(
                f"{path} holds {leaf.codebook} values, which compressed-tensors does not have; "
                f"choose int4, or export with --format hf --merge"
            )
        if leaf.size % leaf.tile:
            raise ValueError(
                f"the rows of {path} have {leaf.size} values, which tiles of {leaf.tile} do not "
                f"divide; quantize with a --tile that does"
            )
        bits, tile, is_float = 4, leaf.tile, False
    elif isinstance(leaf, QArray):
        tile = leaf.shape[-1] // leaf.scale.shape[-1]
        is_float, bits = np.dtype(leaf.qvalue.dtype) != np.int8, 8
    else:
        raise ValueError(
            f"{path} is a {type(leaf).__name__}; quantize the model first, with --scheme qat if it "
            f"was trained with method qat"
        )
    return Kind(bits, is_float, tile, activations)


def _only_kind(kinds: Mapping[str, Kind], sizes: Mapping[str, int]) -> Kind:
    """The kind of all matrices, whose rows have these sizes."""
    if all(kind.tile == sizes[path] for path, kind in kinds.items()):
        kinds = {path: dataclasses.replace(kind, tile=None) for path, kind in kinds.items()}
    found = set(kinds.values())
    if len(found) > 1:
        shown = "; ".join(
            f"{next(path for path, each in kinds.items() if each == kind)} is {kind}"
            for kind in sorted(found, key=str)[:3]
        )
        raise ValueError(
            f"matrices are quantized in different ways ({shown}), but {_TARGET} says one for all"
        )
    return found.pop()


def _parts(leaf: Leaf, kind: Kind, shape: tuple[int, ...]) -> list[tuple[str, Any, Any]]:
    """(name, dtype, shape) of the tensors of a matrix [out, in]."""
    out, size = shape
    if kind.format == PACKED_FORMAT:
        parts: list[tuple[str, Any, Any]] = [
            ("weight_packed", np.int32, (out, kind.num_words(size))),
            ("weight_shape", np.int64, (2,)),
        ]
    else:
        parts = [("weight", kind.code_dtype, shape)]
    parts.append(("weight_scale", np.float32, (out, kind.num_tiles(size))))
    if kind.activations == "static":
        parts.append(("input_scale", np.float32, (1,)))
    return parts


def _values(leaf: Leaf, part: str, kind: Kind) -> np.ndarray:
    """A part of one matrix, whose arrays lie on the host."""
    if part == "input_scale":
        return np.asarray(leaf.activation_scale, np.float32)
    base: Leaf = leaf.base if isinstance(leaf, RoundedInputs) else leaf
    if part == "weight_scale":
        return np.asarray(base.scale.astype(np.float32))
    if part == "weight_shape":
        return np.asarray(base.shape, np.int64)
    if part == "weight":
        return np.asarray(base.qvalue)
    return _packed(base, kind)


def _packed(base: Leaf, kind: Kind) -> np.ndarray:
    """int32 [out, words]: unsigned codes, as many as go into a word, little end first."""
    if kind.bits == 4:
        codes = np.asarray(base.packed) ^ HIGH_BITS[4]
        if base.size % 2:
            codes[:, -1] &= np.uint8(0x0F)
    else:
        codes = np.asarray(base.qvalue).view(np.uint8) ^ HIGH_BITS[8]
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))
    return np.ascontiguousarray(codes).view("<i4")
