"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, in and out.

Loading is strict: the configuration says which tensors there must be, and a tensor too many or too
few, or of another shape, is an error that lists them all. A base model is never passed off as an
adapted one.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats import peft_mixtral
from llama_jax.formats.atomic import atomic_folder
from llama_jax.formats.peft_config import (
    CONFIG_NAME,
    read_adapter_config,
    to_json,
    to_lora_config,
)
from llama_jax.formats.safetensors import SafetensorsFile, write_arrays
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
from llama_jax.weights.tensors import LoraTensor, SavedTensor, is_adapted, is_quantized
from llama_jax.weights.vocabulary import resize_vocabulary

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

_EMBEDDING = "embed_tokens.weight"
_VOCABULARY = {
    _EMBEDDING: "model.embed_tokens",
    "lm_head.weight": "lm_head",
}


# Where PEFT puts the base's rows when it stores whole embeddings: beside a saved copy, beside an
# adapter, or alone. In the last place a saved copy lies too.
_BASE_NAMES = ("original_module.weight", "base_layer.weight", "weight")


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
    folder = Path(folder)
    raw = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    if config.moe is not None:
        raw, tensors = peft_mixtral.to_experts(config, raw, tensors)
    elif raw.get("target_parameters"):
        raise ValueError(
            f"{folder / CONFIG_NAME}: target_parameters is {raw['target_parameters']!r}, but this "
            f"model has no parameters outside of modules"
        )
    _check_modules(folder, config, tensors)
    plan = plan_adapter(config, to_lora_config(config, raw))
    _check_names(folder, config, plan, set(tensors))
    params = _with_vocabulary(folder, config, params, tensors, resize=resize)
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
    _check_stored_embeddings(folder, config, tensors, leaves, dtype)
    return tree.unflatten(leaves)


def adapter_vocab_size(folder: str | Path, config: ModelConfig) -> int:
    """Rows of the embedding that the adapter stores; the model's own number if it stores none."""
    stored = _stored_rows(_read_tensors(Path(folder)))
    return next((len(rows) for rows in stored.values()), config.vocab_size)


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
    return {name.removeprefix(PREFIX): file.view(name) for name in file.header.tensors}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _check_modules(folder: Path, config: ModelConfig, tensors: Iterable[str]) -> None:
    modules = {m for row in weight_table(config).values() for m, _ in module_names(row)}
    modules.add("lm_head")  # a tied head has a name in files
    unknown = [
        name
        for name in tensors
        if not any(name.startswith(f"{module}.") for module in _prefixes(name, modules))
    ]
    if unknown:
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: these tensors belong to no module of this model, so the "
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
        for module in _VOCABULARY.values()
        for name in (*_BASE_NAMES, "modules_to_save.weight")
    }
    if config.tie_word_embeddings and _EMBEDDING in plan.ranks:
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


def _stored_rows(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Path -> the whole embedding or head that the adapter carries, the base's if it has both."""
    stored = {}
    for path, module in _VOCABULARY.items():
        names = [f"{module}.{name}" for name in _BASE_NAMES if f"{module}.{name}" in tensors]
        if names:
            stored[path] = tensors[names[0]]
    return stored


def _with_vocabulary(
    folder: Path,
    config: ModelConfig,
    params: tree.Tree,
    tensors: dict[str, np.ndarray],
    *,
    resize: bool,
) -> tree.Tree:
    """The base with as many rows as the embeddings that the adapter stores."""
    stored = _stored_rows(tensors)
    sizes = {path: len(rows) for path, rows in stored.items()}
    base = tree.flatten(params)[_EMBEDDING].shape[0]
    if all(size == base for size in sizes.values()):
        return params
    described = " and ".join(f"{size} rows of {path}" for path, size in sizes.items())
    if not resize or min(sizes.values()) < base:
        hint = "" if min(sizes.values()) < base else "; pass resize=True to add the new rows to it"
        raise ValueError(
            f"{folder / WEIGHTS_NAME} stores {described}, but the base model has {base} rows{hint}"
        )
    if config.tie_word_embeddings:
        stored = {_EMBEDDING: stored[_EMBEDDING]} if _EMBEDDING in stored else stored
    added = {path: jnp.asarray(rows[base:]) for path, rows in stored.items()}
    return resize_vocabulary(config, params, added)[1]


def _check_stored_embeddings(
    folder: Path,
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    leaves: dict[str, Any],
    dtype: Any,
) -> None:
    """Settles embeddings that the adapter stores besides what it declares.

    Under an adapter they must be the base's own. Where nothing is declared they replace the base's
    weight, as PEFT has it, unless they are equal. A tied head must repeat its embedding.
    """
    stored = _stored_rows(tensors)
    for path, rows in stored.items():
        module = _VOCABULARY[path]
        copy = tensors.get(f"{module}.modules_to_save.weight")
        if copy is not None and not np.array_equal(copy, tensors[f"{module}.weight"]):
            raise ValueError(
                f"{folder / WEIGHTS_NAME}: two different copies of {PREFIX}{module} are stored"
            )
        if config.tie_word_embeddings and path != _EMBEDDING:
            _check_repeats(folder, module, rows, stored.get(_EMBEDDING))
            continue
        leaf = leaves[path]
        declared = isinstance(leaf, LoraTensor | SavedTensor)
        if isinstance(leaf, SavedTensor) and f"{module}.original_module.weight" not in tensors:
            continue  # what is stored is the saved copy, already read
        base = leaf
        while is_adapted(base):
            base = base.base
        if is_quantized(base) or _equal(base, rows):
            continue
        if declared:
            raise ValueError(
                f"{folder / WEIGHTS_NAME}: the adapter of {path} was trained on other base "
                f"weights than this model's: the ones stored beside it differ"
            )
        leaves[path] = SavedTensor(leaf, jnp.asarray(rows, dtype))
    embedding = leaves[_EMBEDDING]
    if "lm_head.lora_A.weight" in tensors and config.tie_word_embeddings:
        assert isinstance(embedding, LoraTensor)
        names = _factor_names(weight_table(config)[_EMBEDDING], _VOCABULARY[_EMBEDDING])
        _check_repeats(
            folder, "lm_head.lora_B", tensors["lm_head.lora_B.weight"], tensors[names[0]].T
        )
        _check_repeats(
            folder, "lm_head.lora_A", tensors["lm_head.lora_A.weight"], tensors[names[1]].T
        )


def _equal(base: jax.Array, rows: np.ndarray) -> bool:
    """Whether they are the same weights, one of them perhaps rounded to the other's dtype."""
    held = np.asarray(base)
    if held.shape != rows.shape:
        return False
    return np.array_equal(held, rows.astype(held.dtype)) or np.array_equal(
        held.astype(rows.dtype), rows
    )


def _check_repeats(folder: Path, name: str, head: np.ndarray, embedding: np.ndarray | None) -> None:
    if embedding is None or not np.array_equal(head, embedding):
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: {PREFIX}{name} differs from the embedding's, but this "
            f"model's head and embedding are one weight; untie them first (untie_embeddings)"
        )


def save_adapter(
    folder: str | Path,
    config: ModelConfig,
    params: tree.Tree,
    *,
    base_model_name_or_path: str | None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes the adapter on `params`, in the dtype its arrays have; returns the files.

    The folder appears whole or not at all. Raises ValueError for a model without adapter and for
    one that PEFT's configuration cannot describe.
    """
    parts = adapters(params)
    if config.moe is not None:
        parts = peft_mixtral.with_one_rank(parts)
    lora = describe_plan(config, plan_of(parts))
    arrays: dict[str, np.ndarray] = {}
    for path, part in parts.items():
        arrays.update(_tensors_of(config, weight_table(config)[path], part))
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        values = to_json(lora, base_model_name_or_path)
        (temporary / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        named = {PREFIX + name: array for name, array in arrays.items()}
        write_arrays(temporary / WEIGHTS_NAME, named, metadata={"format": "pt"})
    return [Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME]


def _tensors_of(config: ModelConfig, row: Weight, part: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(part, SavedTensor):
        saved = np.asarray(part.saved)
        for name, index in row.hf_names():
            yield name, saved[index]
        if config.tie_word_embeddings and row.path == _EMBEDDING:
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
