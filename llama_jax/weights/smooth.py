"""Channels of activations made alike before anything is rounded: SmoothQuant and AWQ.

x W^T = (x / s) (W s)^T for any s > 0 of each input channel, and 1 / s goes into what makes x: a
norm, v_proj or up_proj. The model stays a Llama and computes the same, to the bit, because every s
is a power of two. What changes is how well x / s and W s can be rounded.

SmoothQuant (Xiao et al. 2023, arXiv:2211.10438) is for products of integers: s is large where
inputs are large and weights are not. AWQ (Lin et al. 2023, arXiv:2306.00978) is for weights alone:
s is large where inputs are large, which leaves those weights smaller errors. Both have an exponent,
which is searched for each group of weights: the one with the least error of their outputs.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.weights.cut import check_plain
from llama_jax.weights.float8 import LARGEST, as_float8
from llama_jax.weights.inputs import first_inputs, layers_of, run_layer
from llama_jax.weights.quantize import INTEGER_SCHEMES, Quantization, input_scale
from llama_jax.weights.tensors import to_array

# Which exponents are tried, as in AWQ's own search; nothing at all is tried too.
_EXPONENTS = np.linspace(0.0, 1.0, 20, dtype=np.float32)
# Of how many tokens outputs are compared. The sizes of channels are those of all tokens.
_SEARCH_TOKENS = 1024
# How small the mean input of a channel may be to the largest one before it counts as this.
_LEAST_SHARE = 1e-4


def smooth(
    config: ModelConfig,
    params: tree.Tree,
    rows: Iterable[np.ndarray],
    *,
    scheme: str,
    tile: int | None,
    skip: Sequence[str] | None,
    double: bool,
    compute: Compute,
) -> tree.Tree:
    """The same model with channels scaled for `scheme`: by SmoothQuant where it rounds activations,
    by AWQ where it does not. `rows` are token ids of any length; the other options are those of
    `quantize`. Inputs of experts stay as they are.

    Raises ValueError when there is no row, and as `Quantization.chosen` does.
    """
    check_plain(params)
    is_static = scheme.endswith("-static")
    # Weights are rounded alike by both; which inputs are, is said beside.
    how = Quantization(
        scheme.replace("-static", "-dynamic"),
        tile,
        None if skip is None else tuple(skip),
        double,
    )
    chosen = how.chosen(config, params)
    groups = {
        maker: users
        for maker, users in _groups(config).items()
        if any(f"layers.{user}.weight" in chosen for user in users)
    }
    wanted = [f"layers.{users[0]}.weight" for users in groups.values()]

    @jax.jit
    def run(layer: tree.Tree, x: jax.Array, real: jax.Array) -> tuple[jax.Array, Any]:
        out, seen = run_layer(config, layer, x, real, compute=compute, take=lambda x, _: x)
        return out, {path: seen[path] for path in wanted}

    running = first_inputs(params, rows, compute=compute)
    masks = [np.asarray(real[0]) > 0 for _, real in running]
    smoothed = []
    for layer in layers_of(config, params):
        outs, seen = zip(*(run(layer, x, real) for x, real in running), strict=True)
        running = [(out, real) for out, (_, real) in zip(outs, running, strict=True)]
        for (maker, users), path in zip(groups.items(), wanted, strict=True):
            inputs = np.concatenate(
                [np.asarray(each[path])[mask] for each, mask in zip(seen, masks, strict=True)]
            )
            rounded = [user for user in users if f"layers.{user}.weight" in chosen]
            weights = [tree.flatten(layer)[f"{user}.weight"] for user in rounded]
            scale = _best_scale(config, weights, inputs, how, is_static, maker)
            layer = _rescaled(config, layer, maker, users, scale)
        smoothed.append(layer)
    return {**params, "layers": jax.tree.map(lambda *each: jnp.stack(each), *smoothed)}


def _groups(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """What makes an input -> the weights that are multiplied with it, of a layer."""
    attention = {
        "input_layernorm": tuple(f"self_attn.{name}_proj" for name in "qkv"),
        "self_attn.v_proj": ("self_attn.o_proj",),
    }
    if config.moe is not None:
        return attention
    return {
        **attention,
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.up_proj": ("mlp.down_proj",),
    }


def _best_scale(
    config: ModelConfig,
    weights: Sequence[jax.Array],
    inputs: np.ndarray,
    how: Quantization,
    is_static: bool,
    maker: str,
) -> jax.Array:
    """[in]: the powers of two with which rounding changes the outputs of `weights` least; inputs
    [T, in]."""
    sizes = np.abs(inputs.astype(np.float32))
    heads = (1, 1)
    if maker == "self_attn.v_proj":
        # A key/value head makes the inputs of several query heads, which must agree.
        heads = (config.num_key_value_heads, config.num_query_groups)
    step = max(1, len(inputs) // _SEARCH_TOKENS)
    return _search(
        list(weights),
        jnp.asarray(inputs[::step], jnp.float32),
        _tied(jnp.asarray(sizes.max(axis=0)), heads),
        _tied(jnp.asarray(sizes.mean(axis=0)), heads),
        how=how,
        is_static=is_static,
        heads=heads,
    )


def _tied(sizes: jax.Array, heads: tuple[int, int]) -> jax.Array:
    """[in] with the largest of the query heads of a group in place of each; (1, 1) changes
    nothing."""
    apart = sizes.reshape(*heads, -1)
    return jnp.broadcast_to(apart.max(axis=1, keepdims=True), apart.shape).reshape(-1)


@functools.partial(jax.jit, static_argnames=("how", "is_static", "heads"))
def _search(
    weights: list[jax.Array],
    inputs: jax.Array,
    peak: jax.Array,
    mean: jax.Array,
    *,
    how: Quantization,
    is_static: bool,
    heads: tuple[int, int],
) -> jax.Array:
    wide = [weight.astype(jnp.float32) for weight in weights]
    if how.activations is None:
        scales = _awq(mean)
    else:
        largest = jnp.stack([jnp.abs(weight).max(axis=0) for weight in wide]).max(axis=0)
        scales = _smoothquant(peak, _tied(largest, heads))
    candidates = jnp.concatenate([jnp.ones_like(scales[:1]), scales])
    candidates = jnp.exp2(jnp.round(jnp.log2(candidates)))
    exact = [inputs @ weight.T for weight in wide]

    def error(scale: jax.Array) -> jax.Array:
        x = inputs / scale
        if how.activations is not None:
            x = _rounded(x, (peak / scale).max() if is_static else None, how)
        total = jnp.float32(0)
        for weight, right in zip(wide, exact, strict=True):
            rounded = to_array(how.apply("the weight", weight * scale))
            off = jnp.square(x @ rounded.T - right).sum(axis=-1)
            # Of each token's own size: those with huge outputs, which most models have, hide
            # behind norms and would outweigh all others.
            total += jnp.mean(off / jnp.maximum(jnp.square(right).sum(axis=-1), 1e-20))
        return total

    return candidates[jnp.argmin(jax.lax.map(error, candidates))]


def _smoothquant(peak: jax.Array, largest: jax.Array) -> jax.Array:
    """[exponents, in]: inputs of a channel to the power a over its weights to the power 1 - a."""
    used = (peak > 0) & (largest > 0)
    a = jnp.asarray(_EXPONENTS)[:, None]
    ratio = jnp.where(used, peak, 1.0) ** a / jnp.where(used, largest, 1.0) ** (1 - a)
    ratio = jnp.where(used, ratio, 1.0)
    # The common factor says nothing; a middle of one keeps numbers in range.
    middle = jnp.exp(
        jnp.where(used, jnp.log(ratio), 0.0).sum(axis=1)
        / jnp.maximum(used.sum(), 1).astype(jnp.float32)
    )
    return jnp.where(used, ratio / middle[:, None], 1.0)


def _awq(mean: jax.Array) -> jax.Array:
    """[exponents, in]: the mean input of a channel to a power, about one in the middle."""
    share = jnp.clip(mean / jnp.maximum(mean.max(), jnp.finfo(jnp.float32).tiny), _LEAST_SHARE)
    ratio = share ** jnp.asarray(_EXPONENTS)[:, None]
    return ratio / jnp.sqrt(ratio.max(axis=1) * ratio.min(axis=1))[:, None]


def _rounded(x: jax.Array, peak: jax.Array | None, how: Quantization) -> jax.Array:
    """Activations as what they are rounded to stands for them, by token (and tile of int8) or with
    one largest value."""
    if how.scheme not in INTEGER_SCHEMES:
        return as_float8(x, None if peak is None else input_scale(peak, largest=LARGEST))
    size = x.shape[-1]
    tile = min(how.tile or size, size)
    padded = jnp.pad(x, ((0, 0), (0, -size % tile))).reshape(len(x), -1, tile)
    largest = jnp.abs(padded).max(axis=-1, keepdims=True) if peak is None else peak
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    rounded = jnp.clip(jnp.round(padded / scale), -127, 127) * scale
    return rounded.reshape(len(x), -1)[:, :size]


def _rescaled(
    config: ModelConfig, layer: tree.Tree, maker: str, users: Sequence[str], scale: jax.Array
) -> tree.Tree:
    """The layer with what `maker` makes divided by `scale` and the inputs of `users` multiplied."""
    leaves = tree.flatten(layer)
    for user in users:
        leaves[f"{user}.weight"] = _times(leaves[f"{user}.weight"], scale)
    if maker == "self_attn.v_proj":
        shape = (config.num_key_value_heads, config.num_query_groups, config.head_dim)
        scale = scale.reshape(shape)[:, 0].reshape(-1)
    inverse = 1 / scale
    weight = leaves[f"{maker}.weight"]
    leaves[f"{maker}.weight"] = _times(weight, inverse if weight.ndim == 1 else inverse[:, None])
    if f"{maker}.bias" in leaves:
        leaves[f"{maker}.bias"] = _times(leaves[f"{maker}.bias"], inverse)
    return tree.unflatten(leaves)


def _times(weight: jax.Array, scale: jax.Array) -> jax.Array:
    return (weight.astype(jnp.float32) * scale).astype(weight.dtype)
