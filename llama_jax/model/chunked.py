"""Sums over the positions of a batch, chunk by chunk, with their gradient taken on the way.

The logits of a batch are the largest array of a model. Here they exist for one chunk of positions
at a time, and where a gradient is wanted it is computed with the loss, so that the head's product
runs once forward, and not again in the backward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.weights.leaf import Leaf
from llama_jax.weights.tensors import TappedTensor

# chunk(hidden [B, t, D], head, part, constants) -> (loss, tree of further sums)
Chunk = Callable[..., tuple[jax.Array, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_sums(
    chunk: Chunk, hidden: jax.Array, head: Leaf, parts: Any, constants: Any
) -> tuple[jax.Array, Any]:
    """(loss, further sums), each added up over all chunks, in float32.

    hidden: [chunks, B, t, D]; parts: a tree of [chunks, B, t, ...], taken chunk by chunk;
    constants: a tree of arrays that every chunk sees. The loss is differentiable in `hidden` and
    in the head's arrays, the further sums in nothing.
    """

    def body(totals: Any, piece: Any) -> Any:
        return jax.tree.map(jnp.add, totals, chunk(piece[0], head, piece[1], constants)), None

    first = jax.tree.map(lambda array: array[0], (hidden, parts))
    shapes = jax.eval_shape(chunk, first[0], head, first[1], constants)
    return jax.lax.scan(body, _zeros(shapes), (hidden, parts))[0]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)


def _values(primals: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=_is_primal)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _forward(chunk: Chunk, hidden: Any, head: Any, parts: Any, constants: Any) -> Any:
    """Sums and gradients together; leaves of the head that are frozen get none. A tapped one's is
    rounded once, when all chunks are added up."""
    leaves, structure = jax.tree.flatten(
        head, is_leaf=lambda x: _is_primal(x) or isinstance(x, TappedTensor)
    )
    values = [leaf.array.value if isinstance(leaf, TappedTensor) else leaf.value for leaf in leaves]
    receive = [leaf.tap if isinstance(leaf, TappedTensor) else leaf for leaf in leaves]
    pairs = list(zip(values, receive, strict=True))
    frozen = [None if leaf.perturbed else value for value, leaf in pairs]
    trained = [value if leaf.perturbed else None for value, leaf in pairs]
    hidden, parts, constants = _values((hidden, parts, constants))

    def of_chunk(h: jax.Array, trained: list[Any], part: Any) -> tuple[jax.Array, Any]:
        merged = [f if v is None else v for v, f in zip(trained, frozen, strict=True)]
        return chunk(h, jax.tree.unflatten(structure, merged), part, constants)

    def body(carry: Any, piece: Any) -> Any:
        totals, sums = carry
        found, (dh, dtrained) = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)(
            piece[0], trained, piece[1]
        )
        sums = jax.tree.map(lambda s, d: s + d.astype(jnp.float32), sums, dtrained)
        return (jax.tree.map(jnp.add, totals, found), sums), dh

    first = jax.tree.map(lambda array: array[0], (hidden, parts))
    shapes = jax.eval_shape(of_chunk, first[0], trained, first[1])
    start = (_zeros(shapes), _zeros(trained))
    (totals, sums), dhidden = jax.lax.scan(body, start, (hidden, parts))
    dhead = [
        # None stands for a zero cotangent.
        None if s is None else _received(leaf, s)
        for leaf, s in zip(leaves, sums, strict=True)
    ]
    return totals, (dhidden, jax.tree.unflatten(structure, dhead))


def _received(leaf: Any, gradient: jax.Array) -> Any:
    if isinstance(leaf, TappedTensor):
        return TappedTensor(None, gradient.astype(leaf.tap.value.dtype))
    return gradient.astype(leaf.value.dtype)


def _backward(chunk: Chunk, saved: Any, gradients: Any) -> Any:
    del chunk
    gradient = gradients[0]
    gradients = jax.tree.map(lambda d: d * gradient.astype(d.dtype), saved)
    # Together: the head's gradient would else be rounded at the end of the step, and lie in float32
    # beside the whole backward pass.
    dhidden, dhead = jax.lax.optimization_barrier(gradients)
    return dhidden, dhead, None, None


chunked_sums.defvjp(_forward, _backward, symbolic_zeros=True)
