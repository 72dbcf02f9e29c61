"""Embeddings and heads that a PEFT adapter stores whole: resized, saved, or repeated.

PEFT writes them beside the adapter when they were trained (`modules_to_save`), when they carry an
adapter, and when the vocabulary grew. Each case is told from the others here, so that a base is
only ever extended or replaced where that was trained.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.adapted import LoraTensor, SavedTensor, is_adapted
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.vocabulary import resize_vocabulary

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

EMBEDDING = "embed_tokens.weight"
VOCABULARY = {
    EMBEDDING: "model.embed_tokens",
    "lm_head.weight": "lm_head",
}


# Where PEFT puts the base's rows when it stores whole embeddings: beside a saved copy, beside an
# adapter, or alone. In the last place a saved copy lies too.
BASE_NAMES = ("original_module.weight", "base_layer.weight", "weight")


def stored_rows(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Path -> the whole embedding or head that the adapter carries, the base's if it has both."""
    stored = {}
    for path, module in VOCABULARY.items():
        names = [f"{module}.{name}" for name in BASE_NAMES if f"{module}.{name}" in tensors]
        if names:
            stored[path] = tensors[names[0]]
    return stored


def with_vocabulary(
    folder: Path,
    config: ModelConfig,
    params: tree.Tree,
    tensors: dict[str, np.ndarray],
    *,
    resize: bool,
) -> tree.Tree:
    """The base with as many rows as the embeddings that the adapter stores."""
    stored = stored_rows(tensors)
    sizes = {path: len(rows) for path, rows in stored.items()}
    base = tree.flatten(params)[EMBEDDING].shape[0]
    if all(size == base for size in sizes.values()):
        return params
    described = " and ".join(f"{size} rows of {path}" for path, size in sizes.items())
    if not resize or min(sizes.values()) < base:
        hint = (
            ""
            if min(sizes.values()) < base
            else "; pass resize=True (--resize) to add the new rows to it"
        )
        raise ValueError(
            f"{folder / WEIGHTS_NAME} stores {described}, but the base model has {base} rows{hint}"
        )
    if config.tie_word_embeddings:
        stored = {EMBEDDING: stored[EMBEDDING]} if EMBEDDING in stored else stored
    added = {path: jnp.asarray(rows[base:]) for path, rows in stored.items()}
    return resize_vocabulary(config, params, added)[1]


def settle_stored_embeddings(
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
    stored = stored_rows(tensors)
    for path, rows in stored.items():
        module = VOCABULARY[path]
        copy = tensors.get(f"{module}.modules_to_save.weight")
        if copy is not None and not np.array_equal(copy, tensors[f"{module}.weight"]):
            raise ValueError(
                f"{folder / WEIGHTS_NAME}: two different copies of {PREFIX}{module} are stored"
            )
        if config.tie_word_embeddings and path != EMBEDDING:
            _check_repeats(folder, module, rows, stored.get(EMBEDDING))
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
    embedding = leaves[EMBEDDING]
    if "lm_head.lora_A.weight" in tensors and config.tie_word_embeddings:
        assert isinstance(embedding, LoraTensor)
        module = VOCABULARY[EMBEDDING]
        for head, embedded in (("lora_B", "lora_embedding_A"), ("lora_A", "lora_embedding_B")):
            factor = tensors[f"lm_head.{head}.weight"]
            _check_repeats(folder, f"lm_head.{head}", factor, tensors[f"{module}.{embedded}"].T)


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
