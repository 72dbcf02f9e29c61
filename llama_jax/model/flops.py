"""Operations of a training step in closed form: what a step must do, and what ours does.

Products only, two operations for each multiplication and addition, as is the custom since Kaplan et
al. 2020 (arXiv:2001.08361). T tokens, P weights that each token meets in the layers' matrices.
"""

import math
from dataclasses import dataclass

from llama_jax.config import Compute, ModelConfig
from llama_jax.kernels.splash import padded_size, visited_share
from llama_jax.model.attention import computed_share
from llama_jax.weights.table import weight_table


@dataclass(frozen=True)
class Trained:
    """What a step has gradients for: the layers' matrices, the head, and `adapters` weights of
    low-rank factors that each token meets."""

    layers: bool
    head: bool
    adapters: int = 0


def layer_weights(config: ModelConfig, *, experts: int | None = None) -> int:
    """Weights of the layers' matrices that one token meets, all layers; `experts` of each layer's
    (None: those it is routed to)."""
    total = 0
    for row in weight_table(config).values():
        if row.path.startswith("layers.") and row.role in ("matrix", "router"):
            size = math.prod(row.shape)
            if config.moe is not None and ".experts." in row.path:
                chosen = config.moe.num_experts_per_tok if experts is None else experts
                size = size // config.moe.num_local_experts * chosen
            total += size
    return total


def head_weights(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def model_flops(config: ModelConfig, *, tokens: int, length: int, trained: Trained) -> float:
    """What a step must do, nothing twice: the numerator of model FLOPs utilization (Chowdhery et
    al. 2022, arXiv:2204.02311, appendix B), with each query counted for the keys it sees."""
    products = 2.0 * tokens * (layer_weights(config) + head_weights(config))
    gradients = 2.0 * tokens * trained.layers * layer_weights(config)
    gradients += 2.0 * tokens * trained.head * head_weights(config)
    adapters = 3 * 2.0 * tokens * trained.adapters
    window = min(config.sliding_window or length, length)
    seen = window * (window + 1) / 2 + (length - window) * window
    return 2 * products + gradients + adapters + 3 * _attention(config, tokens, seen / length)


def executed_flops(
    config: ModelConfig,
    compute: Compute,
    *,
    tokens: int,
    length: int,
    trained: Trained,
    parts: int = 1,
) -> float:
    """What our step does: with recomputation, and attention in whole blocks. parts: into how many
    the mesh divides sequences."""
    experts = config.moe.num_local_experts if config.moe and compute.moe == "dense" else None
    layers, head = layer_weights(config, experts=experts), head_weights(config)
    total = 2.0 * tokens * (2 * layers + trained.layers * layers)
    total += 2.0 * tokens * (2 * head + trained.head * head)
    total += 3 * 2.0 * tokens * trained.adapters
    splash = compute.attention == "splash"
    share = visited_share if splash else computed_share
    once = _attention(config, tokens, length * share(length, config.sliding_window, parts))
    if splash:
        once *= padded_size(config.head_dim) / config.head_dim
    # Splash's backward pass computes the scores again, once for the queries and once for the keys.
    total += once * (1 + (3.5 if splash else 2))
    if compute.remat == "none":
        return total
    if compute.remat in ("full", "offload"):
        # The last product of a layer is no part of any gradient, so it is not recomputed.
        last = (
            0
            if config.moe
            else config.num_hidden_layers * (config.hidden_size * config.intermediate_size)
        )
        return total + 2.0 * tokens * (layers - last + trained.adapters) + once
    return total + once


def _attention(config: ModelConfig, tokens: int, keys: float) -> float:
    """Scores and their product with the values, when each token meets `keys` keys."""
    size = config.num_attention_heads * config.head_dim
    return 4.0 * tokens * keys * size * config.num_hidden_layers
