"""Counted operations of functions whose number is plain."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from llama_jax.mesh.flops import count_flops
from llama_jax.mesh.sharding import make_mesh


def count(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.jit(function).trace(*arguments).jaxpr, **options)


def test_a_product_and_its_gradients():
    shapes = (4, 8), (8, 16)
    once = 2 * 4 * 8 * 16
    assert count(jnp.matmul, *shapes) == once
    gradients = jax.value_and_grad(lambda x, w: (x @ w).sum(), argnums=(0, 1))
    assert count(gradients, *shapes) == 3 * once


def test_loops_branches_and_checkpoints():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jax.checkpoint(jnp.matmul)(x, w), None), x, w)[0]

    assert count(scanned, (4, 8), (5, 8, 8)) == 5 * 2 * 4 * 8 * 8

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert count(branched, (8, 8)) == 2 * 2 * 8**3


def test_a_product_in_a_loop_of_unknown_length_is_refused():
    def endless(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="loop of unknown length"):
        count(endless, (4, 4))


def test_all_devices_of_a_mapped_function_count():
    mapped = jax.shard_map(
        lambda x, w: x @ w,
        mesh=make_mesh({"fsdp": 8}),
        in_specs=(PartitionSpec("fsdp"), PartitionSpec()),
        out_specs=PartitionSpec("fsdp"),
    )
    assert count(mapped, (16, 8), (8, 4)) == 2 * 16 * 8 * 4


def test_ragged_products_take_each_row_once():
    sizes = jnp.array([3, 0, 5], jnp.int32)

    def loss(x, w):
        return jax.lax.ragged_dot(x, w, sizes).sum()

    once = 2 * 8 * 4 * 6
    assert count(loss, (8, 4), (3, 4, 6)) == once
    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    assert count(gradients, (8, 4), (3, 4, 6)) == 3 * once
