"""LoRA adapters side by side: stacked beside each matrix, and chosen by row.

All adapters of a matrix are one pair of factors; a row keeps its own adapter's part of what lies
between the two and zeros elsewhere. So rows with different adapters, and with none, share a step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.config import DEFAULT_RULES, LogicalRules, ModelConfig
from llama_jax.formats.peft import load_adapter, stores_embeddings
from llama_jax.mesh.sharding import partition_spec, replicated
from llama_jax.weights.adapted import LoraTensor, StackedLora
from llama_jax.weights.lora import adapters
from llama_jax.weights.table import abstract_params, weight_table

# The matrices of a layer that adapters may lie beside.
_MATRICES = (
    *(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")),
)

# By path, with layers first: A [L, in, R] and B [L, R, out], scale included.
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


class AdapterStack:
    """Room for `count` adapters of up to `rank`, beside the layers of `params`, which are unrolled,
    or stacked, then also on a mesh by `rules`: each device has of a factor what it has of its
    matrix's inputs or outputs. Beside shape structs, which are on a mesh, they are shape structs.
    Raises ValueError for unrolled layers on a mesh."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        count: int,
        rank: int,
        dtype: str,
        mesh: Mesh | None = None,
        rules: LogicalRules = DEFAULT_RULES,
    ):
        self._config, self.count, self.rank = config, count, rank
        self._base, self._mesh, self._rules = params, mesh, rules
        layers, num_layers = params["layers"], config.num_hidden_layers
        if mesh is not None and not isinstance(layers, dict):
            raise ValueError(
                "the layers of these parameters are split, and on a mesh adapters lie beside "
                "stacked ones; give the parameters as they were loaded"
            )
        layer = layers if isinstance(layers, dict) else layers[0]
        # Host copies, by (block, name): A [L, in, count * rank], B transposed alike.
        self._factors: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        width = count * rank
        for block, name in _MATRICES:
            if name in layer.get(block, {}):
                *_, out, inner = layer[block][name]["weight"].shape
                self._factors[block, name] = (
                    np.zeros((num_layers, inner, width), dtype),
                    np.zeros((num_layers, width, out), dtype),
                )

    def params(self) -> Any:
        """The parameters with the adapters as they are now."""
        layers = self._base["layers"]
        if isinstance(layers, dict):
            return {**self._base, "layers": self._beside(layers, slice(None))}
        beside = tuple(self._beside(layer, index) for index, layer in enumerate(layers))
        return {**self._base, "layers": beside}

    def _beside(self, layer: Any, index: int | slice) -> Any:
        """One of unrolled layers, or all stacked ones, with the factors beside the matrices."""
        layer = {name: dict(part) for name, part in layer.items()}
        for (block, name), factors in self._factors.items():
            base = layer[block][name]["weight"]
            arrays, places = [each[index] for each in factors], self._places(block, name)
            # Of a step; `with_chosen` says it.
            nobody: Any = np.zeros((*arrays[0].shape[:-2], 0), np.int32)
            lora_a: Any
            lora_b: Any
            if isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct):
                assert places is not None and self._mesh is not None
                everywhere = replicated(self._mesh)
                lora_a, lora_b, nobody = (
                    jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
                    for array, place in zip([*arrays, nobody], [*places, everywhere], strict=True)
                )
            else:
                lora_a, lora_b = _placed(arrays, places)
            leaf = StackedLora(base, lora_a, lora_b, nobody, self.rank)
            layer[block][name] = {**layer[block][name], "weight": leaf}
        return layer

    def _places(self, block: str, name: str) -> list[NamedSharding] | None:
        """Where both factors of stacked layers lie."""
        if self._mesh is None:
            return None
        stack, out, inner = weight_table(self._config)[_path(block, name)].axes
        axes = (stack, inner, "rank"), (stack, "rank", out)
        return [NamedSharding(self._mesh, partition_spec(each, self._rules)) for each in axes]

    def read(self, folder: str) -> Factors:
        """The adapter of a PEFT folder, checked, on the host. Raises ValueError."""
        if self._mesh is not None and self._mesh.is_multi_process and stores_embeddings(folder):
            raise ValueError(
                f"{folder}: the adapter stores embeddings, which must be those of the model, whose "
                f"own are divided over several hosts; save it without (PEFT's "
                f"save_embedding_layers=False)"
            )
        abstract = {**abstract_params(self._config)}
        # What an adapter stores beside its factors is compared with the base's own.
        abstract |= {name: part for name, part in self._base.items() if name != "layers"}
        found = adapters(load_adapter(folder, self._config, abstract))
        served = {_path(*place) for place in _MATRICES}
        for path, part in found.items():
            if not isinstance(part, LoraTensor) or path not in served:
                raise ValueError(
                    f"{folder}: the adapter changes {path} in a way that cannot be chosen by "
                    f"request; serve a model it is merged into"
                )
            if part.lora_a.shape[1] > self.rank:
                raise ValueError(
                    f"{folder}: the adapter's rank is {part.lora_a.shape[1]}, but max_lora_rank "
                    f"is {self.rank}; start the engine with more"
                )
        return {
            path: (
                np.asarray(part.lora_a, np.float32).swapaxes(1, 2),
                np.asarray(part.lora_b * part.scale[:, None, None], np.float32).swapaxes(1, 2),
            )
            for path, part in found.items()
        }

    def put(self, place: int, adapter: Factors) -> None:
        """Makes adapter number `place` the given one; an empty one changes nothing."""
        begin = place * self.rank
        for (block, name), (lora_a, lora_b) in self._factors.items():
            lora_a[:, :, begin : begin + self.rank] = 0
            lora_b[:, begin : begin + self.rank] = 0
            if (path := _path(block, name)) in adapter:
                a, b = adapter[path]
                end = begin + b.shape[1]
                lora_a[:, :, begin:end] = a
                lora_b[:, begin:end] = b


def _placed(arrays: list[np.ndarray], places: list[NamedSharding] | None) -> list[jax.Array]:
    """On the devices of this process what they hold; other processes do the same with theirs."""
    if places is None:
        return jax.device_put(arrays)
    return [
        jax.make_array_from_callback(array.shape, place, array.__getitem__)
        for array, place in zip(arrays, places, strict=True)
    ]


def _path(block: str, name: str) -> str:
    return f"layers.{block}.{name}.weight"


def with_chosen(params: Any, chosen: jax.Array, *, length: int) -> Any:
    """Parameters in which row b uses adapter chosen[b], none where it is negative; each row has
    `length` tokens."""
    per_token = jnp.repeat(chosen, length)

    def choose(leaf: Any) -> Any:
        if not isinstance(leaf, StackedLora):
            return leaf
        shape = (*leaf.chosen.shape[:-1], *per_token.shape)
        return dataclasses.replace(leaf, chosen=jnp.broadcast_to(per_token, shape))

    return jax.tree.map(choose, params, is_leaf=lambda leaf: isinstance(leaf, StackedLora))
