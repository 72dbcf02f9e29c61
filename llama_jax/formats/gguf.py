"""GGUF files in and out: the llama architecture, plain or with a mixture of experts.

Import decodes each device's slice of each tensor into the buffer that becomes the array. Export
goes tensor by tensor and publishes the file whole. The format is `gguf_reader.py`'s and
`gguf_writer.py`'s subject, the metadata that of `gguf_config.py`, `gguf_rope.py` and
`gguf_vocabulary.py`.

GGUF keeps the rows of q_proj and k_proj in Meta's order; both directions reorder them.
"""

import functools
import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType
from jax.sharding import Mesh

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, LogicalRules, ModelConfig
from llama_jax.formats.gather import check_params, fetch, is_plain
from llama_jax.formats.gguf_config import (
    ARCHITECTURE,
    config_entries,
    own_entry,
    read_config,
    token_entries,
    tokenizer_fields,
)
from llama_jax.formats.gguf_fields import Entry
from llama_jax.formats.gguf_header import GGUFError, GGUFTensor
from llama_jax.formats.gguf_reader import GGUFFile
from llama_jax.formats.gguf_rope import FACTORS_TENSOR, rope_factors
from llama_jax.formats.gguf_tensors import (
    check_tensors,
    gguf_name,
    heads,
    is_expert,
    single_expert,
)
from llama_jax.formats.gguf_vocabulary import vocabulary_entries
from llama_jax.formats.gguf_writer import TensorPlan, check_file_target, write_gguf
from llama_jax.formats.hf import float_dtype
from llama_jax.formats.meta_layout import hf_to_meta, meta_to_hf
from llama_jax.formats.safetensors import convert
from llama_jax.formats.streaming import Into, Placer
from llama_jax.formats.tokenizer import Tokenizer, from_gguf_fields
from llama_jax.weights.quantize import Quantization
from llama_jax.weights.table import Weight, abstract_params, weight_table

logger = logging.getLogger(__name__)

_KINDS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
_FOUR_BITS = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)
_BLOCK = 32
_HALF = {GGMLQuantizationType.F16: "float16", GGMLQuantizationType.BF16: "bfloat16"}
_QUANTIZATION_VERSION = 2


def load_gguf(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: LogicalRules = DEFAULT_RULES,
    dtype: Any = None,
    quantization: Quantization | None = None,
    into: Into | None = None,
) -> tuple[ModelConfig, tree.Tree, Tokenizer | None]:
    """The config, parameters and tokenizer of a GGUF file; None where it has no tokenizer.

    Every block format that the `gguf` package decodes is read; the parameters are plain arrays,
    unless `quantization` quantizes them layer by layer while reading.
    `into` puts them elsewhere than on devices.
    `dtype` None gives float16 or bfloat16 where all matrices are stored so and no norm loses by it,
    and float32 otherwise. Without a mesh the arrays lie on the default device.

    Raises ValueError, before anything is allocated, naming the file and all that does not fit.
    """
    file = GGUFFile(path)
    try:
        config, tokenizer = _read_metadata(file)
        check_tensors(file, config)
    except GGUFError:
        raise
    except ValueError as error:
        raise GGUFError(f"{file.path}: {error}") from error
    if dtype is not None:
        config = config.replace(dtype=float_dtype(dtype))
    table = weight_table(config)
    abstract = abstract_params(config)
    placer = (
        Placer(config, abstract, mesh=mesh, rules=rules, quantization=quantization)
        if into is None
        else into(config, abstract)
    )
    leaves = {
        path: placer.place(row, functools.partial(_read_slice, file, config, row))
        for path, row in table.items()
    }
    return config, tree.unflatten(leaves), tokenizer


def read_gguf_metadata(path: str | Path) -> tuple[ModelConfig, Tokenizer | None]:
    """The config and tokenizer of a GGUF file, without its weights."""
    file = GGUFFile(path)
    try:
        return _read_metadata(file)
    except GGUFError:
        raise
    except ValueError as error:
        raise GGUFError(f"{file.path}: {error}") from error


def _read_metadata(file: GGUFFile) -> tuple[ModelConfig, Tokenizer | None]:
    config = read_config(
        file.metadata,
        {name: tensor.shape for name, tensor in file.tensors.items()},
        dtype=_stored_dtype(file),
        read_factors=lambda: _read_vector(file, FACTORS_TENSOR),
    )
    fields = tokenizer_fields(file.metadata)
    if "tokenizer.ggml.tokens" not in fields:
        return config, None
    return config, from_gguf_fields(fields, vocab_size=config.vocab_size)


def _read_vector(file: GGUFFile, name: str) -> np.ndarray:
    """A whole vector in float32."""
    size = file.tensors[name].shape[-1]
    if file.tensors[name].shape != (size,):
        raise ValueError(f"tensor {name!r} must be a vector, not {file.tensors[name].shape}")
    out = np.empty((1, size), np.float32)
    file.read(name, out, rows=slice(0, 1), columns=slice(0, size))
    return out[0]


def _stored_dtype(file: GGUFFile) -> str:
    """The narrowest dtype of the parameters that loses nothing of what is stored."""

    def is_wide(tensor: GGUFTensor) -> bool:
        return len(tensor.shape) == 1 or ".ffn_gate_inp." in tensor.name

    kinds = {tensor.kind for tensor in file.tensors.values() if not is_wide(tensor)}
    name = _HALF.get(next(iter(kinds))) if len(kinds) == 1 else None
    if name is None:
        return "float32"
    target = np.dtype(jnp.dtype(name))
    for tensor in file.tensors.values():
        if not is_wide(tensor) or tensor.kind in kinds or tensor.name == FACTORS_TENSOR:
            continue
        size = tensor.shape[-1]
        values = np.empty((math.prod(tensor.shape) // size, size), np.float32)
        file.read(tensor.name, values, rows=slice(0, len(values)), columns=slice(0, size))
        with np.errstate(over="ignore"):
            narrow = values.astype(target).astype(np.float32)
        if not np.array_equal(narrow, values, equal_nan=True):
            return "float32"
    return name


def _read_slice(
    file: GGUFFile, config: ModelConfig, row: Weight, out: np.ndarray, index: tuple[slice, ...]
) -> None:
    """Fills `out` with `index` of a parameter that is stacked over layers and experts."""
    depth = (2 if is_expert(row) else 1) if row.path.startswith("layers.") else 0
    stack, inner = index[:depth], index[depth:]
    num_heads = heads(config, row)
    for at in itertools.product(*(range(part.start, part.stop) for part in stack)):
        part = out[tuple(i - s.start for i, s in zip(at, stack, strict=True))]
        name = gguf_name(row, at[0] if at else None)
        if len(inner) == 1:
            values = convert(_read_vector(file, name), part.dtype, name=name, file=file.path)
            part[...] = (meta_to_hf(values, num_heads) if num_heads else values)[inner[0]]
            continue
        rows, columns = inner
        if len(at) == 2 and name in file.tensors:
            first = at[1] * row.shape[2]
            rows = slice(first + rows.start, first + rows.stop)
        elif len(at) == 2:
            name = single_expert(name, at[1])
        file.read(
            name, part, rows=rows, columns=columns, head_rows=config.head_dim if num_heads else None
        )


def save_gguf(
    path: str | Path,
    config: ModelConfig,
    params: tree.Tree,
    tokenizer: Tokenizer | None,
    *,
    dtype: str = "f32",
    name: str | None = None,
    merge: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes a GGUF file that llama.cpp and transformers load, and returns its path.

    `dtype` is f32, f16, bf16, q8_0, q4_0 or q4_1 and says how matrices are stored; norms, biases
    and routers are always f32, as llama.cpp expects. Beside four-bit matrices embedding and head
    are q8_0: they lose most by four bits. `name` becomes general.name. Adapters and quantized
    weights are refused unless `merge` asks for the full matrices they stand for.

    llama.cpp applies no sliding window to this architecture, and transformers' GGUF reader neither
    a window nor rotary scaling nor biases; our own reads all of them back.

    The file appears under its name only when all of it is on the disk; an existing one is refused
    unless `overwrite`. Parameters may be sharded; one tensor at a time is gathered.
    """
    if dtype not in _KINDS:
        raise ValueError(f"dtype is {dtype!r}; GGUF export writes {', '.join(_KINDS)}")
    path = Path(path)
    check_file_target(path, overwrite=overwrite)
    leaves = check_params(config, params, merge=merge, target="a GGUF file")
    sources = {plan.name: (plan, row, at) for plan, row, at in _plan(config, dtype)}
    plans = [plan for plan, _, _ in sources.values()]
    factors = None
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        factors = rope_factors(config)
        plans.insert(0, TensorPlan(FACTORS_TENSOR, factors.shape, GGMLQuantizationType.F32))
    entries = _entries(config, tokenizer, plans, leaves, dtype=dtype, name=name)

    def fetch_tensor(plan: TensorPlan) -> np.ndarray:
        if plan.name == FACTORS_TENSOR:
            assert factors is not None
            return factors
        _, row, at = sources[plan.name]
        values = fetch(leaves[row.path], at, dtype=np.dtype(np.float32), name=plan.name)
        num_heads = heads(config, row)
        return hf_to_meta(values, num_heads) if num_heads else values

    write_gguf(path, entries, plans, fetch_tensor, overwrite=overwrite)
    return path


def _plan(config: ModelConfig, dtype: str) -> list[tuple[TensorPlan, Weight, tuple[int, ...]]]:
    """Every tensor with the row and the layer it comes from, layer by layer."""
    rows = list(weight_table(config).values())
    tensors: list[tuple[Weight, tuple[int, ...]]] = [
        *((row, ()) for row in rows if row.role == "embedding"),
        *(
            (row, (layer,))
            for layer in range(config.num_hidden_layers)
            for row in rows
            if row.path.startswith("layers.")
        ),
        *((row, ()) for row in rows if row.path in ("norm.weight", "lm_head.weight")),
    ]
    plans = []
    for row, at in tensors:
        wide = row.role in ("norm", "bias", "router")
        kind = GGMLQuantizationType.F32 if wide else _KINDS[dtype][0]
        if kind in _FOUR_BITS and row.role in ("embedding", "head"):
            kind = GGMLQuantizationType.Q8_0
        plan = TensorPlan(gguf_name(row, at[0] if at else None), row.shape[len(at) :], kind)
        if kind in (GGMLQuantizationType.Q8_0, *_FOUR_BITS) and plan.shape[-1] % _BLOCK:
            raise ValueError(
                f"tensor {plan.name!r} has rows of {plan.shape[-1]} values, but {dtype} "
                f"stores blocks of {_BLOCK}; write f16 or bf16"
            )
        plans.append((plan, row, at))
    return plans


def _entries(
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    plans: Sequence[TensorPlan],
    leaves: dict[str, Any],
    *,
    dtype: str,
    name: str | None,
) -> list[Entry]:
    text, uint32 = GGUFValueType.STRING, GGUFValueType.UINT32
    entries = [
        Entry("general.architecture", text, ARCHITECTURE),
        Entry("general.type", text, "model"),
        *([Entry("general.name", text, name)] if name is not None else []),
        Entry("general.file_type", uint32, int(_KINDS[dtype][1])),
        Entry("general.quantization_version", uint32, _QUANTIZATION_VERSION),
        *config_entries(config),
    ]
    if tokenizer is None:
        entries += token_entries(config)
    else:
        entries += vocabulary_entries(
            tokenizer, vocab_size=config.vocab_size, end_tokens=config.eos_token_id
        )
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        logger.warning(
            "the file says sliding_window %d, but llama.cpp attends to the whole context for this "
            "architecture: beyond the window its results differ",
            config.sliding_window,
        )
    # In which dtype the parameters come back: their own where the file holds it exactly.
    kinds = {
        np.dtype(leaf.dtype).name if is_plain(leaf) else config.dtype for leaf in leaves.values()
    }
    stored = {"f16": "float16", "bf16": "bfloat16"}.get(dtype, "float32")
    restored = min(kinds) if dtype == "f32" and len(kinds) == 1 else stored
    read_back = read_config(
        {entry.key: entry.value for entry in entries},
        {plan.name: plan.shape for plan in plans},
        dtype=stored,
        read_factors=functools.partial(rope_factors, config),
    )
    own = own_entry(config.replace(dtype=restored), read_back)
    return [*entries, *([own] if own is not None else [])]
