"""The backward pass in another order has the numbers of the plain one, and computes no more."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.gradients import gated, in_turn


def _drawn(*shapes, dtype="float32"):
    draw = np.random.default_rng(3).standard_normal
    return [jnp.asarray(draw(shape), dtype) for shape in shapes]


def _plain_gated(gate, up):
    return jax.nn.silu(gate) * up


def _product(x, weight):
    return jnp.einsum("ti,oi->to", x, weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_are_those_of_the_plain_functions(dtype, remat, apart):
    arrays = _drawn((5, 8), (16, 8), (16, 8), (8, 16), dtype=dtype)

    def loss(x, gate, up, down, gated, product):
        def layer(x):
            return product(gated(_product(x, gate), _product(x, up)), down)

        return jnp.square((jax.checkpoint(layer) if remat else layer)(x).astype("float32")).sum()

    def found(*functions):
        of_all = jax.value_and_grad(lambda *a: loss(*a, *functions), argnums=(0, 1, 2, 3))
        return jax.jit(of_all)(*arrays)

    ours = found(partial(gated, apart=apart), in_turn(_product))
    plain = found(_plain_gated, _product)
    tolerance = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        got, want = np.asarray(got, "float64"), np.asarray(want, "float64")
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("remat", [False, True])
def test_a_frozen_weight_has_no_gradient_computed(remat):
    """Inside a scan over layers, as LoRA has it: the product forward, and the one for x; in the
    backward pass of recomputation once more forward."""
    x, weights, scales = _drawn((5, 8), (3, 8, 8), (3, 8))

    def loss(scales, weights):
        def layer(x, part):
            weight, scale = part
            return jnp.tanh(in_turn(_product)(x * scale, weight)), None

        body = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(body, x, (weights, scales))[0].sum()

    def products(argnums):
        gradient = jax.jit(jax.grad(loss, argnums=argnums))
        words = Counter(gradient.lower(scales, weights).as_text().split())
        return words["stablehlo.dot_general"]

    assert products(0) == 2 + remat
    assert products((0, 1)) == 3 + remat


def test_the_gradient_of_x_waits_for_that_of_the_weight():
    """Both go through one barrier; with a frozen weight there is none."""
    x, weight = _drawn((5, 8), (8, 8))

    def barriers(argnums):
        gradient = jax.grad(lambda x, w: in_turn(_product)(x, w).sum(), argnums=argnums)
        equations = jax.make_jaxpr(gradient)(x, weight).eqns
        return [len(e.outvars) for e in equations if e.primitive.name == "optimization_barrier"]

    assert barriers((0, 1)) == [2]
    assert barriers(0) == []


def test_the_backward_pass_keeps_only_gate_and_up():
    gate, up = _drawn((5, 16), (5, 16))
    _, pull = jax.vjp(gated, gate, up)
    _, plain = jax.vjp(_plain_gated, gate, up)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > 1]
    assert [leaf.tobytes() for leaf in map(np.asarray, kept)] == [
        np.asarray(array).tobytes() for array in (gate, up)
    ]
    assert len([leaf for leaf in jax.tree.leaves(plain) if leaf.size > 1]) > 2
