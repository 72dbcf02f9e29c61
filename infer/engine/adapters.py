"""LoRA adapters side by side: stacked beside each matrix, and chosen by row.

All adapters of a matrix are one pair of factors; a row keeps its own adapter's part of what lies
between the two and zeros elsewhere. So rows with different adapters, and with none, share a step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.formats.peft import load_adapter
from llama_jax.weights.lora import adapters
from llama_jax.weights.table import abstract_params
from llama_jax.weights.tensors import LoraTensor, StackedLora

# The matrices of a layer, by the name they have in it: (block, names whose outputs are joined).
_PLACES = (
    ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", "q_proj", ("q_proj",)),
    ("self_attn", "k_proj", ("k_proj",)),
    ("self_attn", "v_proj", ("v_proj",)),
    ("self_attn", "o_proj", ("o_proj",)),
    ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    ("mlp", "gate_proj", ("gate_proj",)),
    ("mlp", "up_proj", ("up_proj",)),
    ("mlp", "down_proj", ("down_proj",)),
)

# By path, with layers first: A [L, in, R] and B [L, R, out], scale included.
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


class AdapterStack:
    """Room for `count` adapters of up to `rank`, beside the layers of `params` (unrolled)."""

    def __init__(self, config: ModelConfig, params: Any, *, count: int, rank: int, dtype: str):
        self._config, self.count, self.rank, self._dtype = config, count, rank, dtype
        self._base = params
        # Host copies, by (layer, block, name): A [in, parts * count * rank], B transposed alike.
        self._factors: dict[tuple[int, str, str], tuple[np.ndarray, np.ndarray]] = {}
        for index, layer in enumerate(params["layers"]):
            for block, name, parts in _PLACES:
                if name in layer.get(block, {}):
                    out, inner = layer[block][name]["weight"].shape
                    width = len(parts) * count * rank
                    self._factors[index, block, name] = (
                        np.zeros((inner, width), dtype),
                        np.zeros((width, out), dtype),
                    )

    def params(self) -> Any:
        """The parameters with the adapters as they are now."""
        layers = []
        for index, layer in enumerate(self._base["layers"]):
            layer = {name: dict(part) for name, part in layer.items()}
            for block, name, _ in _PLACES:
                if (index, block, name) in self._factors:
                    lora_a, lora_b = jax.device_put(self._factors[index, block, name])
                    base = layer[block][name]["weight"]
                    layer[block][name] = {
                        **layer[block][name],
                        "weight": StackedLora(
                            base, lora_a, lora_b, np.zeros(0, np.int32), self.count, self.rank
                        ),
                    }
            layers.append(layer)
        return {**self._base, "layers": tuple(layers)}

    def read(self, folder: str) -> Factors:
        """The adapter of a PEFT folder, checked, on the host. Raises ValueError."""
        abstract = {**abstract_params(self._config)}
        # What an adapter stores beside its factors is compared with the base's own.
        abstract |= {name: part for name, part in self._base.items() if name != "layers"}
        found = adapters(load_adapter(folder, self._config, abstract))
        served = {f"layers.{block}.{n}.weight" for block, _, names in _PLACES for n in names}
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
        for (index, block, name), (lora_a, lora_b) in self._factors.items():
            parts = next(names for b, n, names in _PLACES if (b, n) == (block, name))
            begin_out = 0
            for number, part in enumerate(parts):
                begin = (number * self.count + place) * self.rank
                lora_a[:, begin : begin + self.rank] = 0
                lora_b[begin : begin + self.rank] = 0
                width = self._width(block, part)
                if f"layers.{block}.{part}.weight" in adapter:
                    a, b = (each[index] for each in adapter[f"layers.{block}.{part}.weight"])
                    lora_a[:, begin : begin + len(b)] = a
                    lora_b[begin : begin + len(b), begin_out : begin_out + width] = b
                begin_out += width

    def _width(self, block: str, name: str) -> int:
        """Outputs of one matrix."""
        config = self._config
        if name in ("q_proj",):
            return config.num_attention_heads * config.head_dim
        if name in ("k_proj", "v_proj"):
            return config.num_key_value_heads * config.head_dim
        return config.intermediate_size if name in ("gate_proj", "up_proj") else config.hidden_size


def with_chosen(params: Any, chosen: jax.Array, *, length: int) -> Any:
    """Parameters in which row b uses adapter chosen[b], none where it is negative; each row has
    `length` tokens."""
    per_token = jnp.repeat(chosen, length)

    def choose(leaf: Any) -> Any:
        if not isinstance(leaf, StackedLora):
            return leaf
        return dataclasses.replace(leaf, chosen=per_token)

    return jax.tree.map(choose, params, is_leaf=lambda leaf: isinstance(leaf, StackedLora))
