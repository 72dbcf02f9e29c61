"""A Hugging Face model folder, checked against its configuration before anything is allocated.

Only safetensors are read. Pickled weights (`pytorch_model.bin`, `*.pth`, `*.pt`) are never opened:
unpickling runs whatever code the file holds.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import FLOAT_DTYPES, ModelConfig
from llama_jax.formats.compressed_config import Stored, stored_weights
from llama_jax.formats.compressed_reader import (
    UNREAD_TENSORS,
    Allowed,
    Matrix,
    allowed_tensors,
    check_shapes,
)
from llama_jax.formats.hf_config import declared_dtype, read_config
from llama_jax.formats.json_fields import read_json
from llama_jax.formats.safetensors import SafetensorsFile
from llama_jax.weights.table import Weight, weight_table

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Rotary frequencies that the first conversions of Llama stored. They follow from the config, are
# computed from it, and are the only tensors that are skipped.
_COMPUTED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
_PICKLED = ("*.bin", "*.pth", "*.pt", "*.pkl", "*.ckpt")
# float64 loads when the caller asks for a narrower type; integers and float8 are quantized weights.
_READABLE = (*FLOAT_DTYPES, "float64")
_COMPARE_BYTES = 16 << 20
# One does not use the bandwidth of a memory.
_COPYING_THREADS = 4


@dataclass(frozen=True)
class HFFolder:
    """An open folder whose tensors are exactly the weights of `config`, shapes included. stored:
    how those are held that are quantized, by their path."""

    path: Path
    config: ModelConfig
    declared_dtype: str | None
    tensors: dict[str, SafetensorsFile]
    stored: dict[str, Stored]

    def plain_dtypes(self) -> Iterator[tuple[np.dtype[Any], int]]:
        """Dtype and bytes of every tensor of a weight that is not quantized."""
        for path, row in weight_table(self.config).items():
            for name, _ in () if path in self.stored else row.hf_names():
                info = self.tensors[name].header.tensors[name]
                yield info.dtype, info.end - info.start

    def stored_dtype(self, row: Weight) -> np.dtype[Any]:
        """The one dtype in which the files hold a weight of the table, all layers together."""
        kinds = {self.tensors[name].header.tensors[name].dtype: name for name, _ in row.hf_names()}
        if len(kinds) > 1:
            stated = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
            raise ValueError(
                f"{self.path}: the layers of {row.path} are stored in different dtypes ({stated}); "
                f"say which to load (dtype=..., or torch_dtype in config.json)"
            )
        return next(iter(kinds))

    def copy_to(self, row: Weight, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Copies `weight[index]` into `out` from the mapped files, tensors side by side."""

        def copy(name: str, part: np.ndarray, where: tuple[slice, ...]) -> None:
            self.tensors[name].copy_to(part, name, where)

        _copy_each(row, out, index, copy)

    def copy_array_to(
        self, row: Weight, array: str, out: np.ndarray, index: tuple[slice, ...]
    ) -> None:
        """The same of an array of a quantized weight, named as in its leaf."""

        def copy(name: str, part: np.ndarray, where: tuple[slice, ...]) -> None:
            module = name.removesuffix(".weight")
            matrix = Matrix(self.tensors, module, self.stored[row.path], row.shape[-1])
            matrix.copy_array(array, part, where)

        _copy_each(row, out, index, copy)


def _copy_each(
    row: Weight,
    out: np.ndarray,
    index: tuple[slice, ...],
    copy: Callable[[str, np.ndarray, tuple[slice, ...]], None],
) -> None:
    """`copy(name, part of out, index into one layer)` for all layers in `index`, side by side."""
    # Behind the stacking dimensions, which all arrays of a weight share, sizes may be others.
    ranges = [range(*part.indices(size)) for part, size in zip(index, row.shape, strict=False)]

    def copy_one(wanted: tuple[str, tuple[int, ...]]) -> None:
        name, at = wanted
        position = tuple(i - steps.start for i, steps in zip(at, ranges, strict=False))
        place: Any = (*position, ...)  # of a number too, which is then an array of it
        copy(name, out[place], index[len(at) :])

    wanted = [
        (name, at)
        for name, at in row.hf_names()
        if all(i in steps for i, steps in zip(at, ranges, strict=False))
    ]
    with ThreadPoolExecutor(_COPYING_THREADS) as pool:
        list(pool.map(copy_one, wanted))


def open_folder(folder: str | Path) -> HFFolder:
    """Opens and checks a model folder; nothing is read but headers.

    Raises ValueError naming every missing file, every missing, unexpected, misplaced or misshaped
    tensor, and every field of the configuration that is not understood.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    config = read_config(path)
    declared = declared_dtype(read_json(path / "config.json"))
    stored = read_stored(path, config)
    tensors = _open_files(path)
    _check_tensors(path, config, tensors, stored)
    _check_tied_head(path, config, tensors)
    opened = HFFolder(path, config, declared, tensors, stored)
    if declared is None:
        opened = dataclasses.replace(opened, config=config.replace(dtype=_main_dtype(opened)))
    return opened


def read_stored(path: Path, config: ModelConfig) -> dict[str, Stored]:
    """How the quantized weights of a folder are held, by their path, as config.json says it."""
    described = path / "config.json"
    try:
        return stored_weights(read_json(described).get("quantization_config"), config)
    except ValueError as error:
        raise ValueError(f"{described}: quantization_config: {error}") from error


def _main_dtype(folder: HFFolder) -> str:
    """The dtype of most of the stored bytes that are not quantized."""
    total: dict[str, int] = {}
    for dtype, size in folder.plain_dtypes():
        total[dtype.name] = total.get(dtype.name, 0) + size
    floats = {name: size for name, size in total.items() if name in FLOAT_DTYPES}
    return max(floats, key=lambda name: floats[name]) if floats else "float32"


def _open_files(path: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it."""
    index, single = path / INDEX_NAME, path / SINGLE_NAME
    if index.is_file() and single.is_file():
        raise ValueError(
            f"{path} holds both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is out of date"
        )
    if single.is_file():
        file = SafetensorsFile(single)
        return dict.fromkeys(file.header.tensors, file)
    if index.is_file():
        return _open_shards(path, _read_index(index))
    raise ValueError(_no_weights(path))


def _no_weights(path: Path) -> str:
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    others = sorted(file.name for file in path.glob("*.safetensors"))
    message = f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}"
    if others:
        return (
            f"{message}, only {', '.join(others[:5])}; shards without their index are an "
            f"incomplete copy, and other names belong to other formats"
        )
    if pickled:
        return (
            f"{message}, only {', '.join(pickled[:5])}. Pickled files can run any code and are not "
            f"opened; convert the model to safetensors, for example by loading it in transformers "
            f"and calling save_pretrained, or use a safetensors revision"
        )
    return message


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map must map tensor names to files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file)
        if not plain or file.startswith("."):
            raise ValueError(
                f"{path}: tensor {name!r} is mapped to {file!r}; it must be the plain name of a "
                f"safetensors file in the same folder"
            )
    return weight_map


def _open_shards(path: Path, weight_map: dict[str, str]) -> dict[str, SafetensorsFile]:
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise ValueError(
            f"{path}: {', '.join(absent)} missing of the {len(names)} files that {INDEX_NAME} "
            f"lists; copy or download the model again"
        )
    shards = {name: SafetensorsFile(path / name) for name in names}
    problems = [
        f"{tensor} should be in {file} and is not"
        for tensor, file in weight_map.items()
        if tensor not in shards[file]
    ]
    problems += [
        f"{tensor} is in {file}, which {INDEX_NAME} does not say"
        for file, shard in shards.items()
        for tensor in shard.header.tensors
        if weight_map.get(tensor) != file and not _COMPUTED.fullmatch(tensor)
    ]
    _raise(path, problems)
    return {tensor: shards[file] for tensor, file in weight_map.items()}


def _check_tensors(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, SafetensorsFile],
    stored: dict[str, Stored],
) -> None:
    """Drops computed tensors from `tensors` and raises one error with all that is wrong."""
    for name in [name for name in tensors if _COMPUTED.fullmatch(name)]:
        del tensors[name]
    _check_count(path, config, len(tensors))
    table = weight_table(config)
    expected: dict[str, Allowed] = {}
    for row in table.values():
        if row.path in stored:
            expected |= allowed_tensors(row, stored[row.path])
        else:
            expected |= {name: ((row.shape[len(at) :],), _READABLE) for name, at in row.hf_names()}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, file in tensors.items():
        info = file.header.tensors[name]
        if name == "lm_head.weight" and config.tie_word_embeddings:
            shapes, dtypes = expected["model.embed_tokens.weight"]
        elif name in expected:
            shapes, dtypes = expected[name]
        else:
            problems.append(f"{name} is unexpected{_hint(name, config, bool(stored))}")
            continue
        if info.shape not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            problems.append(f"{name} has shape {list(info.shape)}, expected {allowed}")
        if info.dtype.name not in dtypes:
            problems.append(f"{name} is {info.dtype}, allowed are {', '.join(dtypes)}")
    _raise(path, problems)
    _raise(
        path, [each for at, how in stored.items() for each in check_shapes(table[at], how, tensors)]
    )


def _check_count(path: Path, config: ModelConfig, num_stored: int) -> None:
    """A corrupt config can ask for a billion tensors: seen here before their names are listed."""
    num_expected = sum(
        math.prod(row.shape[: row.hf_name.count("{")]) for row in weight_table(config).values()
    )
    if num_expected > 100 * (num_stored + 100):
        raise ValueError(
            f"{path}: config.json describes {num_expected} tensors (num_hidden_layers is "
            f"{config.num_hidden_layers}, num_local_experts is "
            f"{config.moe.num_local_experts if config.moe else 0}), but the files hold {num_stored}"
        )


def _hint(name: str, config: ModelConfig, quantized: bool) -> str:
    if quantized and (what := UNREAD_TENSORS.get(name.rpartition(".")[2])):
        return f" ({what} not supported)"
    for part, flag in ((".self_attn.", "attention_bias"), (".mlp.", "mlp_bias")):
        if name.endswith("_proj.bias") and part in name and not getattr(config, flag):
            return f" ({flag} is false in config.json)"
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f" (num_hidden_layers is {config.num_hidden_layers})"
    return ""


def _raise(path: Path, problems: list[str], *, shown: int = 20) -> None:
    if problems:
        more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
        raise ValueError(
            f"{path}: the weights do not fit the configuration: {'; '.join(problems[:shown])}{more}"
        )


def _check_tied_head(path: Path, config: ModelConfig, tensors: dict[str, SafetensorsFile]) -> None:
    """A stored copy of the tied embedding is dropped; a head of its own is never thrown away."""
    if not config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return
    head_file = tensors.pop("lm_head.weight")
    embedding_file = tensors["model.embed_tokens.weight"]
    kinds = {
        head_file.header.tensors["lm_head.weight"].dtype,
        embedding_file.header.tensors["model.embed_tokens.weight"].dtype,
    }
    # Of two dtypes, values are compared in one that holds all of both.
    kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float64)
    rows = max(1, _COMPARE_BYTES // (config.hidden_size * 4))
    for low in range(0, config.vocab_size, rows):
        index = (slice(low, low + rows), slice(None))
        size = (min(rows, config.vocab_size - low), config.hidden_size)
        head, embedding = np.empty(size, kind), np.empty(size, kind)
        head_file.copy_to(head, "lm_head.weight", index)
        embedding_file.copy_to(embedding, "model.embed_tokens.weight", index)
        if head.tobytes() != embedding.tobytes():
            raise ValueError(
                f"{path}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                f"model.embed_tokens.weight; set tie_word_embeddings to false to keep the trained "
                f"head, or remove lm_head.weight to drop it"
            )
