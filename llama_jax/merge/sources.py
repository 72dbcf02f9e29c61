"""The inputs of a merge, of which rows are read as they are needed.

Hugging Face folders are read from their mapped files. Models in other formats are loaded. A PEFT
adapter stands for its base with its update, which is computed in float32.
"""

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats.checkpoint import is_checkpoint
from llama_jax.formats.gather import fetch, is_plain
from llama_jax.formats.hf_folder import HFFolder, open_folder
from llama_jax.formats.peft import load_adapter, stores_embeddings
from llama_jax.formats.peft_config import CONFIG_NAME
from llama_jax.load import find_model, load
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.merge_recipe import Recipe
from llama_jax.weights.table import Weight, weight_table

logger = logging.getLogger(__name__)


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
class AdaptedSource:
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


def open_sources(recipe: Recipe) -> list[Source]:
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
    return AdaptedSource(base, tree.flatten(load_adapter(folder, base.config, params)))
