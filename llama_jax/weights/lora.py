"""LoRA as tree surgery: adapters are put on weights, taken off, merged, and taken out again.

Which weights, ranks and scales an adapter has is `lora_plan.py`'s business; how an adapted
weight multiplies is `dot.py`'s. Nothing here changes the model.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.adapted import DroppedLora, LoraTensor, SavedTensor, is_adapted
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.lora_plan import AdapterPlan, plan_adapter
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.select import table_rows
from llama_jax.weights.table import Weight, weight_table
from llama_jax.weights.tensors import to_array

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


def add_lora(
    config: ModelConfig,
    params: tree.Tree,
    lora: LoraConfig,
    rng: jax.Array,
    *,
    param_dtype: str = "float32",
) -> tree.Tree:
    """The parameters with fresh adapters, which change nothing until they are trained.

    As PEFT draws them: A uniform within 1 / sqrt(in), B zero; on an embedding the token side is
    zero and the other normal(0, 1). Weight number i of the table draws from key i folded into
    `rng`. Factors and the saved copies of `modules_to_save` are held in `param_dtype`; the base,
    quantized or not, is passed through untouched, and may be shape structs under `eval_shape`.
    """
    rows = check_unadapted(config, params)
    plan = plan_adapter(config, lora)
    keys = {path: jax.random.fold_in(rng, number) for number, path in enumerate(rows)}

    def adapt(path: str, leaf: Leaf) -> Leaf:
        if path in plan.saved:
            return SavedTensor(leaf, to_array(leaf, dtype=param_dtype))
        if path not in plan.ranks:
            return leaf
        return _fresh(rows[path], leaf, plan, keys[path], jnp.dtype(param_dtype))

    return tree.map_with_path(adapt, params)


def check_unadapted(config: ModelConfig, params: tree.Tree) -> dict[str, Weight]:
    """The table's rows, after refusing trees that adapters cannot be put on."""
    check_stacked(params)
    adapted = [path for path, leaf in tree.flatten(params).items() if is_adapted(leaf)]
    if adapted:
        raise ValueError(
            f"the model has an adapter already (on {', '.join(adapted)}); merge it with "
            f"merge_lora or take it off with remove_lora first"
        )
    return table_rows(config, params)


def check_stacked(params: tree.Tree) -> None:
    if not isinstance(params["layers"], dict):
        raise ValueError(
            "adapters are added to stacked layers; call add_lora or load_adapter first and "
            "unstack_layers afterwards"
        )


def _fresh(row: Weight, leaf: Leaf, plan: AdapterPlan, rng: jax.Array, dtype: Any) -> LoraTensor:
    ranks = plan.ranks[row.path]
    out, inner = row.shape[-2:]
    largest = int(ranks.max())
    shape_a, shape_b = (*ranks.shape, largest, inner), (*ranks.shape, out, largest)
    if row.role == "embedding":
        lora_a = jax.random.normal(rng, shape_a, jnp.float32)
    else:
        bound = inner**-0.5
        lora_a = jax.random.uniform(rng, shape_a, jnp.float32, -bound, bound)
    real = np.arange(largest) < ranks[..., None]
    lora_a = jnp.where(real[..., None], lora_a, 0.0).astype(dtype)
    return make_lora_tensor(leaf, lora_a, jnp.zeros(shape_b, dtype), row.path, plan)


def make_lora_tensor(
    base: Leaf, lora_a: jax.Array, lora_b: jax.Array, path: str, plan: AdapterPlan
) -> LoraTensor:
    ranks = tuple(int(rank) for rank in plan.ranks[path].reshape(-1))
    scale = jnp.asarray(plan.scales[path], jnp.float32)
    return LoraTensor(base, lora_a, lora_b, scale, ranks, plan.use_rslora)


def with_dropout(
    config: ModelConfig, params: tree.Tree, key: jax.Array, rate: float, *, axis: str | None
) -> tree.Tree:
    """The parameters as one step of training uses them: what goes into each adapter is dropped out
    with probability `rate`, by numbers that follow from the key, the weight and the layer.

    Raises ValueError as `check_dropout` does.
    """
    check_dropout(config, params)
    numbers = {path: number for number, path in enumerate(weight_table(config))}

    def dropped(path: str, leaf: Leaf) -> Leaf:
        if not isinstance(leaf, LoraTensor) or path == _EMBEDDING:
            return leaf
        own = jax.random.fold_in(key, numbers[path])
        keys = jax.random.key_data(jax.random.split(own, leaf.scale.shape))
        held = {spec.name: getattr(leaf, spec.name) for spec in dataclasses.fields(leaf)}
        return DroppedLora(**held, key=keys, rate=rate, axis=axis)

    return tree.map_with_path(dropped, params)


def check_dropout(config: ModelConfig, params: tree.Tree) -> None:
    """Raises ValueError for adapters whose input `dot` does not see whole, and where there are none
    but an embedding's, which looks rows up, and drops nothing in PEFT either."""
    heads = {_HEAD, _EMBEDDING} if config.tie_word_embeddings else {_HEAD}
    adapted = [p for p, leaf in tree.flatten(params).items() if isinstance(leaf, LoraTensor)]
    for path in adapted:
        if path in heads or ".experts." in path:
            raise ValueError(
                f"lora.lora_dropout is above 0 and {path} has an adapter, but experts and the head "
                f"are multiplied in pieces, whose inputs are not dropped out; leave it out "
                f"(lora.exclude_modules), or set lora_dropout to 0"
            )
    if adapted == [_EMBEDDING]:
        raise ValueError(
            f"lora.lora_dropout is above 0, but {_EMBEDDING} alone has an adapter, which looks "
            f"rows up and drops nothing; set lora_dropout to 0"
        )


def remove_lora(params: tree.Tree) -> tree.Tree:
    """The parameters as they were before any adapter."""

    def bare(leaf: Leaf) -> Leaf:
        while is_adapted(leaf):
            leaf = leaf.base
        return leaf

    return tree.map_with_path(lambda _, leaf: bare(leaf), params)


def merge_lora(params: tree.Tree, dtype: Any = None, *, onto: tree.Tree | None = None) -> tree.Tree:
    """Adapted weights become plain arrays: base and updates are summed in float32, rounded once.

    dtype: of the merged weights; None keeps the base's, and float32 for a quantized base. A
    quantized base is merged as what it stands for, because that is what the adapter was trained
    on; `onto` (parameters without adapters) merges onto other weights of the same shapes instead,
    for instance the originals. Weights without an adapter are passed through.
    """
    others = None if onto is None else tree.flatten(onto)

    def merge(path: str, leaf: Leaf) -> Leaf:
        if not is_adapted(leaf):
            return leaf
        if others is not None:
            leaf = _on_other(path, leaf, others)
        return _merged(leaf, jnp.dtype(_merged_dtype(leaf) if dtype is None else dtype))

    return tree.map_with_path(merge, params)


def _on_other(path: str, leaf: Leaf, others: dict[str, Leaf]) -> Leaf:
    if path not in others or is_adapted(others[path]):
        raise ValueError(f"onto holds no unadapted weight {path} to merge onto")
    if others[path].shape != leaf.shape:
        raise ValueError(
            f"{path} is {leaf.shape} here and {others[path].shape} in onto; they must be equal"
        )
    base = leaf.base
    inner = _on_other(path, base, others) if is_adapted(base) else others[path]
    return dataclasses.replace(leaf, base=inner)


def _merged_dtype(leaf: Leaf) -> Any:
    while is_adapted(leaf):
        leaf = leaf.base
    return jnp.float32 if is_quantized(leaf) else leaf.dtype


@functools.partial(jax.jit, static_argnums=1)
def _merged(leaf: Leaf, dtype: Any) -> jax.Array:
    """One layer after the other, so that a float32 copy never exists of more than one."""
    if isinstance(leaf, SavedTensor) or leaf.ndim == 2:
        return to_array(leaf, dtype=dtype)
    return jax.lax.map(lambda layer: to_array(layer, dtype=dtype), leaf)


def adapters(params: tree.Tree) -> dict[str, Leaf]:
    """Path -> what the adapter holds for that weight: adapted leaves whose base is None.

    Of one adapter: a tree with a second one on top of the first is refused.
    """
    parts = {path: leaf for path, leaf in tree.flatten(params).items() if is_adapted(leaf)}
    for path, leaf in parts.items():
        if is_adapted(leaf.base):
            raise ValueError(f"{path} has two adapters; merge them, or take the parts one by one")
    return {path: dataclasses.replace(leaf, base=None) for path, leaf in parts.items()}


def plan_of(parts: dict[str, Leaf]) -> AdapterPlan:
    """The plan of the adapter that `adapters` took out."""
    if not parts:
        raise ValueError("the parameters hold no adapter")
    ranks, scales = {}, {}
    for path, part in parts.items():
        if isinstance(part, LoraTensor):
            stack = part.lora_a.shape[:-2]
            ranks[path] = np.reshape(np.asarray(part.ranks, np.int64), stack)
            scales[path] = np.asarray(part.scale, np.float64)
    flags = {part.use_rslora for part in parts.values() if isinstance(part, LoraTensor)}
    if len(flags) > 1:
        raise ValueError("use_rslora differs between the weights of this adapter")
    saved = frozenset(path for path, part in parts.items() if isinstance(part, SavedTensor))
    return AdapterPlan(ranks, scales, saved, flags == {True})


def apply_adapters(params: tree.Tree, parts: dict[str, Leaf]) -> tree.Tree:
    """Puts what `adapters` took out onto the parameters; shapes must fit."""
    leaves = tree.flatten(params)
    for path, part in parts.items():
        if path not in leaves:
            raise ValueError(f"the adapter changes {path}, which these parameters do not hold")
        if is_adapted(leaves[path]):
            raise ValueError(f"{path} has an adapter already; merge it or take it off first")
        if isinstance(part, SavedTensor):
            shape = part.saved.shape
        else:
            shape = (*part.lora_a.shape[:-2], part.lora_b.shape[-2], part.lora_a.shape[-1])
        if leaves[path].shape != shape:
            raise ValueError(
                f"the adapter of {path} is for shape {shape}, but the weight has "
                f"{leaves[path].shape}"
            )
    return tree.map_with_path(
        lambda path, leaf: dataclasses.replace(parts[path], base=leaf) if path in parts else leaf,
        params,
    )


def unmerge_lora(params: tree.Tree, parts: dict[str, Leaf]) -> tree.Tree:
    """Undoes a merge: subtracts the updates, in float32, and puts the adapter beside the result.

    parts: what `adapters` gave before the merge. The base comes back up to the rounding that the
    merge did. A weight of `modules_to_save` was replaced, not added to, so it cannot be recovered
    and is refused: keep the unmerged parameters, merging does not consume them.
    """
    replaced = [path for path, part in parts.items() if isinstance(part, SavedTensor)]
    if replaced:
        raise ValueError(
            f"the originals of {', '.join(replaced)} were replaced by saved modules and cannot be "
            f"computed from the merged weights; keep the unmerged parameters instead"
        )

    def subtract(path: str, leaf: Leaf) -> Leaf:
        if path not in parts:
            return leaf
        if is_quantized(leaf) or is_adapted(leaf):
            raise ValueError(f"{path} is not a merged weight; there is nothing to subtract from")
        wide = to_array(leaf) - parts[path].delta()
        return wide.astype(leaf.dtype)

    return apply_adapters(tree.map_with_path(subtract, params), parts)
