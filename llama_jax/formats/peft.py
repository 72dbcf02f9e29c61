"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, in and out.

Loading is strict: the configuration says which tensors there must be, and a tensor too many or too
few, or of another shape, is an error that lists them all. A base model is never passed off as an
adapted one.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import FLOAT_DTYPES, ModelConfig
from llama_jax.formats import peft_mixtral
from llama_jax.formats.atomic import atomic_folder
from llama_jax.formats.peft_config import (
    CONFIG_NAME,
    read_adapter_config,
    to_json,
    to_lora_config,
)
from llama_jax.formats.peft_vocabulary import (
    BASE_NAMES,
    EMBEDDING,
    PREFIX,
    VOCABULARY,
    WEIGHTS_NAME,
    settle_stored_embeddings,
    stored_rows,
    with_vocabulary,
)
from llama_jax.formats.safetensors import SafetensorsFile, write_arrays
from llama_jax.paths import to_path
from llama_jax.weights.adapted import SavedTensor
from llama_jax.weights.lora import (
    adapters,
    check_stacked,
    check_unadapted,
    make_lora_tensor,
    plan_of,
)
from llama_jax.weights.lora_plan import (
    AdapterPlan,
    describe_plan,
    module_names,
    plan_adapter,
)
from llama_jax.weights.table import Weight, weight_table


def load_adapter(
    folder: str | Path,
    config: ModelConfig,
    params: tree.Tree,
    *,
    resize: bool = False,
    on_top: bool = False,
    param_dtype: str = "float32",
) -> tree.Tree:
    """`params`, with stacked layers, with the adapter of `folder` on them.

    on_top: allow parameters that have an adapter already; the updates then add up.

    resize: allow an adapter that stores embeddings for more tokens than the base has. The base
    then grows by the new rows, old ones unchanged, and `vocab_size` of the config must follow:
    `config.replace(vocab_size=adapter_vocab_size(folder, config))`.

    Tensors are converted to `param_dtype`, which adapters are trained in.

    Raises ValueError for anything but plain LoRA, for tensors that are missing or match nothing
    (all are listed), for shapes that do not fit, and for adapters stored only as pickle.
    """
    if not on_top:
        check_unadapted(config, params)
    check_stacked(params)
    folder = to_path(folder)
    raw = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    try:
        if config.moe is not None:
            raw, tensors = peft_mixtral.to_experts(config, raw, tensors)
        elif raw.get("target_parameters"):
            raise ValueError(
                f"target_parameters is {raw['target_parameters']!r}, but this model has no "
                f"parameters outside of modules"
            )
        _check_modules(config, tensors)
        plan = plan_adapter(config, to_lora_config(config, raw))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    _check_names(folder, config, plan, set(tensors))
    params = with_vocabulary(folder, config, params, tensors, resize=resize)
    rows, leaves = weight_table(config), tree.flatten(params)
    dtype = jnp.dtype(param_dtype)
    for path in plan.ranks:
        lora_a, lora_b = _factors(folder, tensors, rows[path], leaves[path].shape, plan)
        leaves[path] = make_lora_tensor(
            leaves[path], jnp.asarray(lora_a, dtype), jnp.asarray(lora_b, dtype), path, plan
        )
    for path in plan.saved:
        value = _stack(folder, tensors, rows[path], leaves[path].shape)
        leaves[path] = SavedTensor(leaves[path], jnp.asarray(value, dtype))
    settle_stored_embeddings(folder, config, tensors, leaves, dtype)
    return tree.unflatten(leaves)


def adapter_vocab_size(folder: str | Path, config: ModelConfig) -> int:
    """Rows of the embedding that the adapter stores; the model's own number if it stores none."""
    stored = stored_rows(_read_tensors(Path(folder)))
    return next((len(rows) for rows in stored.values()), config.vocab_size)


def stores_embeddings(folder: str | Path) -> bool:
    """Whether the adapter brings a whole embedding or head beside or instead of its factors."""
    return bool(stored_rows(_read_tensors(Path(folder))))


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """By name behind PEFT's prefix; views of the mapped file."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder} holds its adapter only as adapter_model.bin, a pickle, which could run "
                f"any code and is not opened; save it again with PEFT as {WEIGHTS_NAME}"
            )
        raise ValueError(f"{folder} holds no {WEIGHTS_NAME}")
    file = SafetensorsFile(path)
    foreign = [name for name in file.header.tensors if not name.startswith(PREFIX)]
    if foreign:
        raise ValueError(f"{path}: these tensors lack the prefix {PREFIX!r}: {_listed(foreign)}")
    for name, info in file.header.tensors.items():
        if info.dtype.name not in (*FLOAT_DTYPES, "float64"):
            raise ValueError(
                f"{path}: {name} is {info.dtype}; allowed are {', '.join(FLOAT_DTYPES)}, float64"
            )
    return {name.removeprefix(PREFIX): file.view(name) for name in file.header.tensors}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _check_modules(config: ModelConfig, tensors: Iterable[str]) -> None:
    modules = {m for row in weight_table(config).values() for m, _ in module_names(row)}
    modules.add("lm_head")  # a tied head has a name in files
    unknown = [
        name
        for name in tensors
        if not any(name.startswith(f"{module}.") for module in _prefixes(name, modules))
    ]
    if unknown:
        raise ValueError(
            f"{WEIGHTS_NAME}: these tensors belong to no module of this model, so the "
            f"adapter is for another one: {_listed(PREFIX + name for name in unknown)}"
        )


def _prefixes(name: str, modules: set[str]) -> list[str]:
    parts = name.split(".")
    starts = (".".join(parts[:end]) for end in range(1, len(parts)))
    return [start for start in starts if start in modules]


def _factor_names(row: Weight, module: str) -> tuple[str, str]:
    """PEFT's names of the factors next to the input and next to the output."""
    if row.role == "embedding":
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _planned(row: Weight, plan: AdapterPlan) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(module, index, rank) of the adapted matrices of a weight."""
    for module, index in module_names(row):
        rank = int(plan.ranks[row.path][index])
        if rank:
            yield module, index, rank


def _check_names(folder: Path, config: ModelConfig, plan: AdapterPlan, found: set[str]) -> None:
    rows = weight_table(config)
    expected = {name for path in plan.saved for name, _ in rows[path].hf_names()}
    for path in plan.ranks:
        for module, _, _ in _planned(rows[path], plan):
            expected.update(_factor_names(rows[path], module))
    # Embeddings may be stored beside the adapter, and a tied one under the head's name again.
    optional = {
        f"{module}.{name}"
        for module in VOCABULARY.values()
        for name in (*BASE_NAMES, "modules_to_save.weight")
    }
    if config.tie_word_embeddings and EMBEDDING in plan.ranks:
        optional |= {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
    missing, unmatched = expected - found, found - expected - optional
    problems = []
    if unmatched:
        problems.append(
            f"tensors that its configuration does not cover: "
            f"{_listed(PREFIX + name for name in unmatched)}"
        )
    if missing:
        problems.append(
            f"tensors that its configuration covers and the file lacks: "
            f"{_listed(PREFIX + name for name in missing)}"
        )
    if problems:
        raise ValueError(f"{folder / WEIGHTS_NAME} has " + "; and ".join(problems))


def _factors(
    folder: Path,
    tensors: dict[str, np.ndarray],
    row: Weight,
    shape: tuple[int, ...],
    plan: AdapterPlan,
) -> tuple[np.ndarray, np.ndarray]:
    """Both factors of a weight of `shape`, stacked and padded to its largest rank, in float32."""
    stack, (out, inner) = shape[:-2], shape[-2:]
    largest = int(plan.ranks[row.path].max())
    lora_a = np.zeros((*stack, largest, inner), np.float32)
    lora_b = np.zeros((*stack, out, largest), np.float32)
    for module, index, rank in _planned(row, plan):
        name_a, name_b = _factor_names(row, module)
        if row.role == "embedding":
            # PEFT's embedding is [V, D]: its A is our B transposed, and the other way round.
            a = _checked(folder, tensors, name_b, (inner, rank)).T
            b = _checked(folder, tensors, name_a, (rank, out)).T
        else:
            a = _checked(folder, tensors, name_a, (rank, inner))
            b = _checked(folder, tensors, name_b, (out, rank))
        lora_a[index][:rank] = a
        lora_b[index][:, :rank] = b
    return lora_a, lora_b


def _stack(
    folder: Path, tensors: dict[str, np.ndarray], row: Weight, shape: tuple[int, ...]
) -> np.ndarray:
    value = np.zeros(shape, np.float32)
    for name, index in row.hf_names():
        value[index] = _checked(folder, tensors, name, shape[len(index) :])
    return value


def _checked(
    folder: Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]
) -> np.ndarray:
    tensor = tensors[name]
    if tensor.shape != shape:
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: {PREFIX}{name} has shape {tensor.shape}, but this model and "
            f"the adapter's configuration make it {shape}"
        )
    return tensor.astype(np.float32)


def save_adapter(
    folder: str | Path,
    config: ModelConfig,
    params: tree.Tree,
    *,
    base_model_name_or_path: str | None,
    lora_dropout: float = 0.0,
    overwrite: bool = False,
) -> list[Path]:
    """Writes the adapter on `params`, in the dtype its arrays have; returns the files.

    lora_dropout: what the adapter was trained with, which its arrays do not say; it changes nothing
    but further training.

    The folder appears whole or not at all. Raises ValueError for a model without adapter and for
    one that PEFT's configuration cannot describe.
    """
    parts = adapters(params)
    if config.moe is not None:
        parts = peft_mixtral.with_one_rank(parts)
    lora = replace(describe_plan(config, plan_of(parts)), lora_dropout=lora_dropout)
    arrays: dict[str, np.ndarray] = {}
    for path, part in parts.items():
        arrays.update(_tensors_of(config, weight_table(config)[path], part))
    values = to_json(lora, base_model_name_or_path)
    if config.moe is not None:
        values, arrays = peft_mixtral.fuse_without_down(config, lora, values, arrays)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        named = {PREFIX + name: array for name, array in arrays.items()}
        write_arrays(temporary / WEIGHTS_NAME, named, metadata={"format": "pt"})
    return [Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME]


def _tensors_of(config: ModelConfig, row: Weight, part: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(part, SavedTensor):
        saved = np.asarray(part.saved)
        for name, index in row.hf_names():
            yield name, saved[index]
        if config.tie_word_embeddings and row.path == EMBEDDING:
            yield "lm_head.weight", saved
        return
    lora_a, lora_b = np.asarray(part.lora_a), np.asarray(part.lora_b)
    ranks = np.reshape(part.ranks, row.shape[:-2])
    for module, index in module_names(row):
        rank = int(ranks[index])
        if not rank:
            continue
        a, b = lora_a[index][:rank], lora_b[index][:, :rank]
        name_a, name_b = _factor_names(row, module)
        if row.role == "embedding":
            yield name_a, b.T
            yield name_b, a.T
            if config.tie_word_embeddings:
                yield "lm_head.lora_A.weight", a
                yield "lm_head.lora_B.weight", b
        else:
            yield name_a, a
            yield name_b, b
