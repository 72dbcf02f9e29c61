"""Several LoRA adapters as one, whose update is the weighted sum of theirs."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.leaf import Leaf


def weighted_sum(
    parts: Sequence[Mapping[str, Leaf]],
    weights: Sequence[float],
    base: Callable[[str], np.ndarray],
) -> dict[str, Leaf]:
    """parts: of each adapter, by path, what it holds for a weight. base: the weights of the model
    that they are for, asked for where one of them trained a whole weight.

    The sum of updates has, in general, the sum of their ranks, so the factors stand side by side:
    sum of w s B A = [w1 s1 B1, w2 s2 B2, ...] [A1; A2; ...], as PEFT's `add_weighted_adapter` has
    it with `combination_type="cat"`. Exact but for one rounding of each entry of B to float32.
    """
    total: dict[str, Leaf] = {}
    for path in dict.fromkeys(path for each in parts for path in each):
        own = [
            (each[path], weight)
            for each, weight in zip(parts, weights, strict=True)
            if path in each
        ]
        if any(isinstance(leaf, SavedTensor) for leaf, _ in own):
            total[path] = _saved(own, np.asarray(base(path), np.float64))
        else:
            total[path] = _side_by_side(own)
    return total


def _side_by_side(own: Sequence[tuple[Leaf, float]]) -> LoraTensor:
    first = own[0][0]
    stack: tuple[int, ...] = first.lora_a.shape[:-2]
    out, inner = first.lora_b.shape[-2], first.lora_a.shape[-1]
    ranks = [np.reshape(leaf.ranks, stack) for leaf, _ in own]
    together = np.sum(ranks, axis=0)
    lora_a = np.zeros((*stack, int(together.max()), inner), np.float32)
    lora_b = np.zeros((*stack, out, int(together.max())), np.float32)
    for index in np.ndindex(*stack):
        begin = 0
        for (leaf, weight), rank in zip(own, ranks, strict=True):
            end = begin + int(rank[index])
            factor = weight * np.asarray(leaf.scale, np.float64)[index]
            lora_a[index][begin:end] = np.asarray(leaf.lora_a)[index][: end - begin]
            lora_b[index][:, begin:end] = (
                factor * np.asarray(leaf.lora_b, np.float64)[index][:, : end - begin]
            )
            begin = end
    ones = np.ones(stack, np.float32)
    return LoraTensor(None, lora_a, lora_b, ones, tuple(int(r) for r in together.reshape(-1)))


def _saved(own: Sequence[tuple[Leaf, float]], base: np.ndarray) -> SavedTensor:
    value = base.copy()
    for leaf, weight in own:
        if isinstance(leaf, SavedTensor):
            value += weight * (np.asarray(leaf.saved, np.float64) - base)
        else:
            value += weight * np.asarray(leaf.delta(), np.float64)
    return SavedTensor(None, value.astype(np.float32))
