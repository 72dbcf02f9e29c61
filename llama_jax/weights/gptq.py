"""GPTQ: codes that are chosen for the inputs a weight sees, not for the weight alone.

Frantar et al. 2022, arXiv:2210.17323. The columns of a matrix are rounded one after the other, and
what the rounding of one adds to the outputs the columns behind it take away again, as far as the
inputs of both go together (their second moments H over unlabelled rows). Columns with the largest
inputs come first. Scales are those of rounding to nearest, known beforehand, so that the result is
the leaf that `quantize` makes with other codes.

Qwix has the method too (`qwix.contrib.gptq_core`), as a program that grows with the number of
columns; here it is a loop of fixed size. Tests hold the one to the other.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwix import QArray

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.weights.cut import check_plain
from llama_jax.weights.inputs import first_inputs, layers_of, run_layer
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantize import Quantization, Scheme, to_codes
from llama_jax.weights.quantized import (
    NF4_VALUES,
    PackedTensor,
    RoundedInputs,
    is_quantized,
    pack_nibbles,
)
from llama_jax.weights.tensors import to_array

# How many columns are rounded before their errors reach the columns far behind them, and which part
# of the mean of H's diagonal is added to it; both as the authors have them.
_BLOCK = 128
_DAMPING = 0.01


def gptq(
    config: ModelConfig,
    params: tree.Tree,
    rounded: tree.Tree,
    rows: Iterable[np.ndarray],
    *,
    how: Quantization,
    compute: Compute,
) -> tree.Tree:
    """`rounded`, which `quantize` made of `params` as `how` says, with better codes in its layers.

    Layer by layer: the inputs of each are those that the layers before it, already rounded, give.
    Raises ValueError when there is no row, and where inputs are not finite.
    """
    check_plain(params)
    paths = [
        path
        for path, leaf in tree.flatten(rounded).items()
        if is_quantized(leaf) and path.startswith("layers.")
    ]

    @jax.jit
    def look(layer: tree.Tree, x: jax.Array, real: jax.Array) -> Any:
        moments = run_layer(config, layer, x, real, compute=compute, take=_moments)[1]
        return {path: moments[path] for path in paths}

    @jax.jit
    def go_on(layer: tree.Tree, x: jax.Array, real: jax.Array) -> jax.Array:
        return run_layer(config, layer, x, real, compute=compute, take=_moments)[0]

    running = first_inputs(rounded, rows, compute=compute)
    both = zip(layers_of(config, params), layers_of(config, rounded), strict=True)
    done = []
    for number, (plain, coarse) in enumerate(both):
        moments = functools.reduce(
            lambda a, b: jax.tree.map(jnp.add, a, b), (look(plain, *each) for each in running)
        )
        leaves, weights = tree.flatten(coarse), tree.flatten(plain)
        for path in paths:
            name = path.removeprefix("layers.")
            if not jnp.isfinite(moments[path]).all():
                raise ValueError(f"the inputs of {path} in layer {number} are not finite")
            leaves[name] = choose_codes(weights[name], moments[path], leaves[name], how.weights)
        finer = tree.unflatten(leaves)
        full = _full(finer, weights["input_layernorm.weight"].dtype)
        running = [(go_on(full, x, real), real) for x, real in running]
        done.append(finer)
    return {**rounded, "layers": jax.tree.map(lambda *each: jnp.stack(each), *done)}


def _full(layer: tree.Tree, dtype: Any) -> tree.Tree:
    """The layer with the matrices its leaves stand for: a CPU has no fast products of integers."""
    return tree.map_with_path(
        lambda _, leaf: to_array(leaf, dtype=dtype) if is_quantized(leaf) else leaf, layer
    )


def _moments(inputs: jax.Array, counts: jax.Array) -> jax.Array:
    """[in, in]: the sum over tokens of x x^T."""
    wide = jnp.where(counts[:, None] > 0, inputs.astype(jnp.float32), 0.0)
    return jnp.einsum("ti,tj->ij", wide, wide, precision=jax.lax.Precision.HIGHEST)


def choose_codes(weight: jax.Array, moments: jax.Array, leaf: Leaf, scheme: Scheme) -> Leaf:
    """`leaf`, which stands for weight [..., out, in], with codes for inputs of these second moments
    [..., in, in]; leading dimensions count experts."""
    scale = _column_scales(leaf)
    solve = functools.partial(_solve, scheme=scheme)
    if weight.ndim == 2:
        codes = solve(weight, moments, scale)
    else:
        codes = jax.lax.map(lambda each: solve(*each), (weight, moments, scale))
    return _with_codes(leaf, codes)


@functools.partial(jax.jit, static_argnames="scheme")
def _solve(weight: jax.Array, moments: jax.Array, scale: jax.Array, *, scheme: Scheme) -> jax.Array:
    """Stored codes [out, in] of weight [out, in] with scales [out, in]."""
    size = weight.shape[-1]
    diagonal = jnp.diag(moments)
    order = jnp.argsort(-diagonal, stable=True)
    # A channel that is never fed has no say, and is rounded to nearest.
    never = jnp.where(diagonal == 0, 1.0, 0.0)
    moments = moments + jnp.diag(never + _DAMPING * diagonal.mean())
    wide = weight.astype(jnp.float32)[:, order]
    scale, moments = scale[:, order], moments[order][:, order]
    factor = jnp.linalg.cholesky(moments)
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(size, dtype=jnp.float32))
    upper = jnp.linalg.cholesky(inverse, upper=True)

    block = min(_BLOCK, size)
    blocks = -(-size // block)
    padding = blocks * block - size
    # Columns of zeros behind the last, which nothing reaches.
    wide, scale = (
        jnp.pad(each, ((0, 0), (0, padding)), constant_values=value)
        for each, value in ((wide, 0.0), (scale, 1.0))
    )
    upper = jnp.pad(upper, ((0, padding), (0, padding)))
    upper += jnp.diag((jnp.arange(blocks * block) >= size).astype(jnp.float32))
    columns = jnp.arange(block)

    def of_block(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
        wide, codes = carry
        begin = number * block
        part = jax.lax.dynamic_slice_in_dim(wide, begin, block, axis=1)
        scales = jax.lax.dynamic_slice_in_dim(scale, begin, block, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(upper, begin, block, axis=0)
        inner = jax.lax.dynamic_slice_in_dim(rows, begin, block, axis=1)

        def of_column(i: jax.Array, held: Any) -> Any:
            part, stored, errors = held
            code = to_codes(part[:, i], scales[:, i], scheme)
            error = (part[:, i] - _values(code, scheme) * scales[:, i]) / inner[i, i]
            behind = jnp.where(columns > i, inner[i], 0.0)
            part = part - error[:, None] * behind
            return part, stored.at[:, i].set(code), errors.at[:, i].set(error)

        none = jax.lax.dynamic_slice_in_dim(codes, begin, block, axis=1)
        held = (part, none, jnp.zeros_like(part))
        _, stored, errors = jax.lax.fori_loop(0, block, of_column, held)
        far = jnp.where(jnp.arange(blocks * block) >= begin + block, rows, 0.0)
        wide = wide - jnp.matmul(errors, far, precision=jax.lax.Precision.HIGHEST)
        return wide, jax.lax.dynamic_update_slice_in_dim(codes, stored, begin, axis=1)

    kind = jax.eval_shape(lambda: to_codes(wide, scale, scheme)).dtype
    _, codes = jax.lax.fori_loop(0, blocks, of_block, (wide, jnp.zeros(wide.shape, kind)))
    return jnp.zeros((len(weight), size), kind).at[:, order].set(codes[:, :size])


def _values(codes: jax.Array, scheme: Scheme) -> jax.Array:
    """What stored codes stand for, before the scale."""
    if scheme.codebook == "nf4":
        return jnp.asarray(NF4_VALUES, jnp.float32)[codes]
    return codes.astype(jnp.float32)


def _column_scales(leaf: Leaf) -> jax.Array:
    """The scale of each value, float32 [..., out, in]."""
    base = leaf.base if isinstance(leaf, RoundedInputs) else leaf
    scale = base.scale.astype(jnp.float32)
    tile = base.tile if isinstance(base, PackedTensor) else base.shape[-1] // scale.shape[-1]
    return jnp.repeat(scale, tile, axis=-1)[..., : base.shape[-1]]


def _with_codes(leaf: Leaf, codes: jax.Array) -> Leaf:
    if isinstance(leaf, RoundedInputs):
        return dataclasses.replace(leaf, base=_with_codes(leaf.base, codes))
    if isinstance(leaf, PackedTensor):
        return dataclasses.replace(leaf, packed=pack_nibbles(codes))
    return QArray(codes, leaf.scale, leaf.zero_point, leaf.qtype)
