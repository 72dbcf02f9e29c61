"""Merging models into a Hugging Face folder, tensor by tensor.

Hugging Face folders are read from their mapped files, a few rows of every input at a time; only
the merged tensor is held whole, for the writer. Models in other formats are loaded. A PEFT adapter
stands for its base with its update, which is computed in float32 as its rows are needed; a sum of
adapters can also become one adapter.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats.atomic import atomic_folder, check_target
from llama_jax.formats.checkpoint import is_checkpoint
from llama_jax.formats.gather import fetch, is_plain
from llama_jax.formats.hf import in_file_order, write_descriptions
from llama_jax.formats.hf_folder import HFFolder, open_folder
from llama_jax.formats.peft import load_adapter, save_adapter, stores_embeddings
from llama_jax.formats.peft_config import CONFIG_NAME
from llama_jax.formats.safetensors import TensorSpec, convert, parse_bytes, write_sharded
from llama_jax.load import find_model, load, load_abstract
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.lora_sum import weighted_sum
from llama_jax.weights.merge import Rows, make_combine, widest
from llama_jax.weights.merge_recipe import Recipe
from llama_jax.weights.table import Weight, weight_table

logger = logging.getLogger(__name__)

# Values of one input that are looked at together.
_CHUNK_VALUES = 4 << 20
# Fields that say what is done with weights of the same shapes.
_MATHEMATICS = ("rope_theta", "rope_scaling", "rms_norm_eps", "sliding_window")
_SHOWN = 3


class Source(Protocol):
    """An input: `rows` gives rows low to high of a tensor in `dtype`; a vector's rows are its
    values."""

    @property
    def config(self) -> ModelConfig: ...

    def stored(self, row: Weight, name: str, at: tuple[int, ...]) -> np.dtype[Any]: ...

    def rows(
        self, row: Weight, name: str, at: tuple[int, ...], bounds: tuple[int, int], dtype: Any
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class _Folder:
    folder: HFFolder

    @property
    def config(self) -> ModelConfig:
        return self.folder.config

    def stored(self, row: Weight, name: str, at: tuple[int, ...]) -> np.dtype[Any]:
        return self.folder.tensors[name].header.tensors[name].dtype

    def rows(
        self, row: Weight, name: str, at: tuple[int, ...], bounds: tuple[int, int], dtype: Any
    ) -> np.ndarray:
        rest = row.shape[len(at) + 1 :]
        out = np.empty((bounds[1] - bounds[0], *rest), dtype)
        index = (slice(*bounds), *(slice(0, size) for size in rest))
        self.folder.tensors[name].copy_to(out, name, index)
        return out


@dataclass(frozen=True)
class _Loaded:
    config: ModelConfig
    leaves: dict[str, Any]

    def stored(self, row: Weight, name: str, at: tuple[int, ...]) -> np.dtype[Any]:
        leaf = self.leaves[row.path]
        return np.dtype(leaf.dtype) if is_plain(leaf) else np.dtype(np.float32)

    def rows(
        self, row: Weight, name: str, at: tuple[int, ...], bounds: tuple[int, int], dtype: Any
    ) -> np.ndarray:
        kind = self.stored(row, name, at)
        whole = fetch(self.leaves[row.path], at, dtype=kind, name=name)
        return whole[slice(*bounds)].astype(dtype)


@dataclass(frozen=True)
class _Adapted:
    """A base with the adapter of a PEFT folder."""

    base: Source
    leaves: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    def stored(self, row: Weight, name: str, at: tuple[int, ...]) -> np.dtype[Any]:
        changed = isinstance(self.leaves[row.path], LoraTensor | SavedTensor)
        return np.dtype(np.float32) if changed else self.base.stored(row, name, at)

    def rows(
        self, row: Weight, name: str, at: tuple[int, ...], bounds: tuple[int, int], dtype: Any
    ) -> np.ndarray:
        leaf, part = self.leaves[row.path], slice(*bounds)
        if isinstance(leaf, SavedTensor):
            return np.asarray(leaf.saved)[at][part].astype(dtype)
        values = self.base.rows(row, name, at, bounds, dtype)
        if isinstance(leaf, LoraTensor):
            lora_a, lora_b = np.asarray(leaf.lora_a)[at], np.asarray(leaf.lora_b)[at]
            scale = np.asarray(leaf.scale)[at].astype(dtype)
            values += (lora_b[part].astype(dtype) @ lora_a.astype(dtype)) * scale
        return values


@dataclass(frozen=True)
class Merged:
    """tensors: how many were written. shared_rows: of the embedding, those that were merged; None
    where all of them were."""

    files: list[Path]
    tensors: int
    shared_rows: int | None


def merge_models(
    recipe: Recipe,
    out: str | Path,
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Any = None,
) -> Merged:
    """Writes the model that a recipe describes as a Hugging Face folder, or the adapter as a PEFT
    folder, which appears whole.

    max_shard_size: of one file of a model, 5GB unless said; an adapter is one file whatever its
    size. progress: told(tensors done, tensors in all, name).

    Raises ValueError, before anything is written, for inputs that do not fit each other, naming
    the inputs and the sizes.
    """
    check_target(out, overwrite=overwrite)
    if recipe.output == "adapter" and max_shard_size is not None:
        raise ValueError(
            f"max_shard_size is {max_shard_size}, but the recipe's output is adapter, which is "
            "written as one file; leave max_shard_size (--max-shard-size) out"
        )
    max_bytes = parse_bytes("5GB" if max_shard_size is None else max_shard_size)
    sources = _open(recipe)
    if recipe.output == "adapter":
        return _merge_adapters(recipe, sources, Path(out), overwrite=overwrite)
    config, tokenizer = sources[0].config, _tokenizer(recipe)
    _check_shapes(recipe, sources)
    shared = _shared_rows(recipe, sources)
    if tokenizer is not None:
        tokenizer.check_vocab(config.vocab_size)
        config = _with_ids(recipe, config)
    wanted = None if recipe.dtype is None else np.dtype(jnp.dtype(recipe.dtype))
    specs, places = [], {}
    for row, name, at in in_file_order(config):
        kind = wanted or sources[0].stored(row, name, at)
        specs.append(TensorSpec(name, kind, row.shape[len(at) :]))
        places[name] = (row, at)
    done = 0

    def merged(spec: TensorSpec) -> np.ndarray:
        nonlocal done
        if progress is not None:
            progress(done, len(specs), spec.name)
        done += 1
        return _merged_tensor(recipe, sources, spec, places[spec.name], shared)

    with atomic_folder(out, overwrite=overwrite) as temporary:
        write_descriptions(temporary, config, {spec.dtype.name for spec in specs}, tokenizer)
        write_sharded(
            temporary, specs, merged, max_shard_bytes=max_bytes, metadata={"format": "pt"}
        )
    if progress is not None:
        progress(len(specs), len(specs), "written")
    files = sorted(Path(out).iterdir())
    return Merged(files, len(specs), None if shared is None else int(shared.sum()))


def _merge_adapters(recipe: Recipe, sources: list[Source], out: Path, *, overwrite: bool) -> Merged:
    """One adapter in place of several, for the same base."""
    base, *others = sources
    parts = []
    for (name, model), source in zip(recipe.inputs[1:], others, strict=True):
        if not isinstance(source, _Adapted):
            raise ValueError(
                f"output is adapter, but {name} ({model}) is a model and no PEFT adapter; what it "
                f"differs from the base in has no low rank: leave output out to write a model"
            )
        parts.append(
            {k: v for k, v in source.leaves.items() if isinstance(v, LoraTensor | SavedTensor)}
        )
    weights = [recipe.scale * entry.weight for entry in recipe.entries]
    if recipe.normalize:
        total = sum(entry.weight for entry in recipe.entries)
        weights = [weight / total for weight in weights]
    table = weight_table(base.config)

    def whole(path: str) -> np.ndarray:
        row = table[path]
        values = np.empty(row.shape, np.float32)
        for name, at in row.hf_names():
            bounds = (0, row.shape[len(at)])
            values[at] = base.rows(row, name, at, bounds, np.float32)
        return values

    merged = weighted_sum(parts, weights, whole)
    if recipe.dtype is not None:
        kind = jnp.dtype(recipe.dtype)
        merged = {path: _in_dtype(leaf, kind) for path, leaf in merged.items()}
    save_adapter(
        out,
        base.config,
        tree.unflatten(merged),
        base_model_name_or_path=recipe.inputs[0][1],
        overwrite=overwrite,
    )
    return Merged(sorted(out.iterdir()), len(merged), None)


def _in_dtype(leaf: Any, kind: Any) -> Any:
    if isinstance(leaf, SavedTensor):
        return SavedTensor(None, leaf.saved.astype(kind))
    return dataclasses.replace(
        leaf, lora_a=leaf.lora_a.astype(kind), lora_b=leaf.lora_b.astype(kind)
    )


# Inputs


def _open(recipe: Recipe) -> list[Source]:
    """The inputs in order; one that appears twice is opened once."""
    base = dict(recipe.inputs).get("base")

    @functools.cache
    def opened(model: str) -> Source:
        if not (Path(model) / CONFIG_NAME).is_file():
            return _open_model(model)
        if base is None:
            raise ValueError(
                f"{model} is a PEFT adapter, which means something only on its base, and method "
                f"{recipe.method} names none; use task_arithmetic, ties, dare or chat_vector, "
                f"whose recipes have a base"
            )
        if model == base:
            raise ValueError(f"base {base} is a PEFT adapter; name the model that it is for")
        return _open_adapter(model, opened(base))

    return [opened(model) for _, model in recipe.inputs]


def _open_model(model: str) -> Source:
    path = find_model(model)
    if path.is_dir() and not is_checkpoint(path):
        folder = open_folder(path)
        if not folder.stored:
            return _Folder(folder)
    logger.info("%s is no Hugging Face folder of full weights and is loaded whole", model)
    loaded = load(path)
    return _Loaded(loaded.config, tree.flatten(loaded.params))


def _open_adapter(folder: str, base: Source) -> Source:
    def struct(row: Weight) -> Any:
        if "vocab" in row.axes and stores_embeddings(folder):
            name, at = next(iter(row.hf_names()))
            kind = base.stored(row, name, at)
            return base.rows(row, name, at, (0, row.shape[0]), kind)
        return jax.ShapeDtypeStruct(row.shape, np.float32)

    params = tree.unflatten({path: struct(row) for path, row in weight_table(base.config).items()})
    return _Adapted(base, tree.flatten(load_adapter(folder, base.config, params)))


def _check_shapes(recipe: Recipe, sources: list[Source]) -> None:
    """Everything but the number of vocabulary rows must agree; mathematics that differs is told."""
    first, host = recipe.inputs[0][0], sources[0].config
    wanted = _shapes(host)
    for (name, model), source in zip(recipe.inputs, sources, strict=True):
        found = _shapes(source.config)
        for path in (*wanted, *found):
            shapes = wanted.get(path), found.get(path)
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{name} ({model}) has {path} of shape {shapes[1]}, {first} "
                    f"({recipe.inputs[0][1]}) {shapes[0]}; only models of one architecture merge"
                )
        for field in _MATHEMATICS:
            values = getattr(host, field), getattr(source.config, field)
            if values[0] != values[1]:
                logger.warning(
                    "%s has %s %s, %s has %s; the result has %s's",
                    *(name, field, values[1], first, values[0], first),
                )


def _shapes(config: ModelConfig) -> dict[str, Any]:
    return {
        path: tuple(
            "vocabulary" if axis == "vocab" else size
            for axis, size in zip(row.axes, row.shape, strict=True)
        )
        for path, row in weight_table(config).items()
    }


# Vocabulary


def _shared_rows(recipe: Recipe, sources: list[Source]) -> np.ndarray | None:
    """Which rows of the vocabulary are merged, [V of the result]; None: all.

    Raises ValueError when sizes or tokens differ and the recipe has no policy for that.
    """
    sizes = [source.config.vocab_size for source in sources]
    rows = np.arange(sizes[0])
    if recipe.vocabulary == "keep":
        return rows < 0
    tables = [_tokens(model) for _, model in recipe.inputs]
    same = rows < min(sizes)
    for table in tables[1:]:
        if table is not None and tables[0] is not None:
            alike = [tables[0].get(i) == table.get(i) for i in rows.tolist()]
            same &= np.asarray(alike, bool)
    if same.all() and len(set(sizes)) == 1:
        return None
    if recipe.vocabulary == "shared_rows":
        if not same.any():
            raise ValueError("vocabulary is shared_rows, but no row means the same token in all")
        return same
    stated = ", ".join(
        f"{name} has {size}" for (name, _), size in zip(recipe.inputs, sizes, strict=True)
    )
    raise ValueError(
        f"the vocabularies differ: of the rows of the embedding {stated}"
        f"{_differing(tables, same, min(sizes))}. Set vocabulary: shared_rows to merge the rows "
        f"that mean the same token in all and leave the rest of {recipe.inputs[0][0]} as it is, or "
        f"vocabulary: keep to leave its embedding and head alone"
    )


def _differing(tables: list[Any], same: np.ndarray, common: int) -> str:
    at = np.flatnonzero(~same[:common])
    if not len(at):
        return ""
    shown = "; ".join(
        f"{i} is {' or '.join(dict.fromkeys(repr(t.get(int(i))) for t in tables if t is not None))}"
        for i in at[:_SHOWN]
    )
    return f", and {len(at)} rows that all have stand for different tokens ({shown})"


def _tokens(model: str) -> dict[int, str] | None:
    tokenizer = _own_tokenizer(model)
    if tokenizer is None:
        return None
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {index: token for token, index in vocabulary.items()}


@functools.lru_cache(maxsize=8)
def _own_tokenizer(model: str) -> Any:
    from llama_jax.formats.tokenizer import load_tokenizer

    path = Path(model)
    if (path / CONFIG_NAME).is_file():
        has_own = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return load_tokenizer(path) if has_own else None
    return load_abstract(model).tokenizer


def _tokenizer(recipe: Recipe) -> Any:
    """Of the input or model that the recipe names, or of the first input."""
    inputs = dict(recipe.inputs)
    if recipe.tokenizer is None:
        return _own_tokenizer(recipe.inputs[0][1])
    tokenizer = _own_tokenizer(inputs.get(recipe.tokenizer, recipe.tokenizer))
    if tokenizer is None:
        raise ValueError(f"tokenizer is {recipe.tokenizer}, which brings no tokenizer")
    return tokenizer


def _with_ids(recipe: Recipe, config: ModelConfig) -> ModelConfig:
    """Begin, end and padding follow the model that the tokenizer is from."""
    if recipe.tokenizer is None:
        return config
    model = dict(recipe.inputs).get(recipe.tokenizer, recipe.tokenizer)
    if (Path(model) / CONFIG_NAME).is_file():
        return config
    other = load_abstract(model).config
    return config.replace(
        bos_token_id=other.bos_token_id,
        eos_token_id=other.eos_token_id,
        pad_token_id=other.pad_token_id,
    )


# One tensor


def _merged_tensor(
    recipe: Recipe,
    sources: list[Source],
    spec: TensorSpec,
    place: tuple[Weight, tuple[int, ...]],
    shared: np.ndarray | None,
) -> np.ndarray:
    row, at = place
    out = np.empty(spec.shape, spec.dtype)
    kinds = [source.stored(row, spec.name, at) for source in sources]
    wide = widest(kinds)
    merged_rows = len(out)
    if shared is not None and "vocab" in row.axes:
        merged_rows = int(np.flatnonzero(shared)[-1]) + 1 if shared.any() else 0
    step = max(1, _CHUNK_VALUES // max(1, out[:1].size))

    def read(source: Source, low: int, high: int, dtype: Any) -> np.ndarray:
        return source.rows(row, spec.name, at, (low, high), dtype)

    def passes() -> Iterator[Rows]:
        for low in range(0, merged_rows, step):
            high = min(low + step, merged_rows)
            yield [read(source, low, high, wide) for source in sources]

    combine = make_combine(recipe, passes, spec.name)
    low = 0
    for rows in passes():
        high = low + len(rows[0])
        out[low:high] = convert(combine(rows), spec.dtype, name=spec.name)
        if shared is not None and "vocab" in row.axes:
            kept = np.flatnonzero(~shared[low:high])
            own = read(sources[0], low, high, kinds[0])
            out[low:high][kept] = convert(own[kept], spec.dtype, name=spec.name)
        low = high
    for low in range(merged_rows, len(out), step):
        own = read(sources[0], low, min(low + step, len(out)), kinds[0])
        out[low : low + step] = convert(own, spec.dtype, name=spec.name)
    return out
