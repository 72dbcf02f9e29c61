"""Adapters that are not at their start, for tests that compare what they compute."""

import dataclasses

import jax
import numpy as np

from llama_jax.weights.select import trainable_mask


def trained(config, params, seed: int = 0, size: float = 0.1):
    """`params` with noise on everything an adapter trains, as if a few steps had been taken.

    Padding of stacked ranks stays zero, as it does in training.
    """
    rng = np.random.default_rng(seed)
    mask = trainable_mask(config, params, None, method="lora")
    moved = jax.tree.map(
        lambda x, train: x + rng.normal(0.0, size, x.shape).astype(x.dtype) if train else x,
        params,
        mask,
    )
    return jax.tree.map(_padding_to_zero, moved, is_leaf=lambda x: hasattr(x, "lora_a"))


def _padding_to_zero(leaf):
    if not hasattr(leaf, "lora_a"):
        return leaf
    ranks = np.reshape(leaf.ranks, leaf.lora_a.shape[:-2])
    real = np.arange(leaf.lora_a.shape[-2]) < ranks[..., None]
    return dataclasses.replace(
        leaf,
        lora_a=leaf.lora_a * real[..., None].astype(leaf.lora_a.dtype),
        lora_b=leaf.lora_b * real[..., None, :].astype(leaf.lora_b.dtype),
    )
