"""How far a student's next-token distributions are from a teacher's, and the loss made of it.

Names follow the direction: forward KL is KL(teacher || student) = sum p log(p / q), reverse KL is
KL(student || teacher) = sum q log(q / p), with p the teacher's and q the student's probabilities.
Jensen-Shannon is the mean of the KL of both to (p + q) / 2.

Logits are divided by a temperature and divergences multiplied by its square, so that the size of
the gradient hardly depends on it (Hinton et al. 2015, arXiv:1503.02531).
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
# Stands for minus infinity: far below any logit, and finite, so that no NaN comes of it.
_NEVER = -1e30


def divergences(
    student: Float[Array, "... V"],
    teacher: Float[Array, "... V"],
    *,
    kind: Divergence,
    temperature: Any = 1.0,
) -> Float[Array, "..."]:
    """Of each pair of logit rows, times temperature squared; no gradient flows to the teacher."""
    temperature = jnp.asarray(temperature, jnp.float32)
    q = jax.nn.log_softmax(_wide(student) / temperature)
    p = jax.lax.stop_gradient(jax.nn.log_softmax(_wide(teacher) / temperature))
    return jnp.square(temperature) * of_log_probs(q, p, kind=kind)


def _wide(logits: jax.Array) -> jax.Array:
    return jnp.maximum(logits.astype(jnp.float32), _NEVER)


def of_log_probs(
    student: Float[Array, "... V"], teacher: Float[Array, "... V"], *, kind: Divergence
) -> Float[Array, "..."]:
    """The divergence of log-probabilities. What neither gives any probability counts nothing."""
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    middle = jnp.logaddexp(student, teacher) - math.log(2.0)
    return 0.5 * (_kl(teacher, middle) + _kl(student, middle))


def _kl(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum exp(a) (a - b), where 0 log 0 is 0."""
    there = a > _NEVER / 2
    difference = jnp.where(there, a - b, 0.0)
    return jnp.sum(jnp.where(there, jnp.exp(a), 0.0) * difference, axis=-1)


def real_ids(logits: Float[Array, "... V"], num_ids: int) -> Float[Array, "... V"]:
    """Logits in which padding of the vocabulary, ids from `num_ids`, has no probability."""
    if logits.shape[-1] <= num_ids:
        return logits
    # By comparison, not by a slice: this stays local when the vocabulary is sharded.
    return jnp.where(jnp.arange(logits.shape[-1]) < num_ids, logits, _NEVER)


def same_ids(
    student: Float[Array, "... V"], teacher: Float[Array, "... W"], num_ids: int
) -> tuple[jax.Array, jax.Array]:
    """Both over the ids that stand for tokens: padding removed, one length."""
    size = min(student.shape[-1], teacher.shape[-1])
    return real_ids(student[..., :size], num_ids), real_ids(teacher[..., :size], num_ids)


def top_log_probs(
    logits: Float[Array, "... V"], *, num_ids: int, k: int, temperature: float
) -> tuple[Int[Array, "... k"], Float[Array, "... k_and_rest"]]:
    """(the k likeliest ids, their log-probabilities and behind them that of all others together).

    The probability of the others is summed up and not what is left to one, so nothing of it is
    lost to rounding.
    """
    logits = real_ids(_wide(logits), num_ids)
    p = jax.nn.log_softmax(logits / temperature)
    top, ids = jax.lax.top_k(p, k)
    return ids, jnp.concatenate([top, _rest(p, ids)], axis=-1)


def _rest(log_probs: jax.Array, ids: jax.Array) -> jax.Array:
    """[..., 1]: the log of the summed probability of all but `ids`."""
    others = jnp.put_along_axis(log_probs, ids, _NEVER, axis=-1, inplace=False)
    return jnp.maximum(jax.nn.logsumexp(others, axis=-1, keepdims=True), _NEVER)


def top_divergences(
    student: Float[Array, "... V"],
    ids: Int[Array, "... k"],
    teacher: Float[Array, "... k_and_rest"],
    *,
    num_ids: int,
    kind: Divergence,
    temperature: Any,
) -> Float[Array, "..."]:
    """`divergences` where of the teacher only `top_log_probs` is known: all other ids count as one.

    Never larger than the divergence of the whole distributions, and equal to it when k is all ids.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    q = jax.nn.log_softmax(real_ids(_wide(student), num_ids) / temperature)
    picked = jnp.concatenate([jnp.take_along_axis(q, ids, axis=-1), _rest(q, ids)], axis=-1)
    return jnp.square(temperature) * of_log_probs(picked, teacher, kind=kind)
