"""Layers apart: on a CPU in the memory of the stacked ones, elsewhere and in programs copies."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.layout import unstack_layers


def stacked(shape=(3, 64, 32), dtype="float32"):
    values = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape).astype(dtype)
    return {"layers": {"mlp": {"up_proj": {"weight": values}}}}


def arrays(params):
    return [layer["mlp"]["up_proj"]["weight"] for layer in params["layers"]]


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn", "uint8"])
def test_on_a_cpu_no_layer_is_copied(dtype, committed):
    params = jax.device_put(stacked(dtype=dtype), jax.devices()[0] if committed else None)
    whole = params["layers"]["mlp"]["up_proj"]["weight"]
    begin, size = whole.unsafe_buffer_pointer(), whole.nbytes // 3
    for number, one in enumerate(arrays(unstack_layers(params))):
        assert (one.dtype, one.committed) == (whole.dtype, whole.committed)
        assert one.unsafe_buffer_pointer() == begin + number * size
        np.testing.assert_array_equal(one.astype("float32"), whole[number].astype("float32"))


def test_layers_of_a_size_that_is_not_aligned_are_copied():
    whole = stacked((3, 5, 3))["layers"]["mlp"]["up_proj"]["weight"]
    for number, one in enumerate(arrays(unstack_layers(stacked((3, 5, 3))))):
        np.testing.assert_array_equal(one, whole[number])


def test_layers_outlive_what_becomes_of_the_stack():
    params = stacked()
    layers = arrays(unstack_layers(params))
    wanted = [np.array(one) for one in layers]
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    more = double(params)
    np.testing.assert_array_equal(more["layers"]["mlp"]["up_proj"]["weight"][1], 2 * wanted[1])
    del params
    for one, before in zip(layers, wanted, strict=True):
        np.testing.assert_array_equal(one, before)


def test_the_stack_goes_with_its_layers():
    params = stacked()
    whole = weakref.ref(params["layers"]["mlp"]["up_proj"]["weight"])
    layers = arrays(unstack_layers(params))
    del params
    gc.collect()
    assert whole() is not None
    del layers
    gc.collect()
    assert whole() is None


def test_host_arrays_shape_structs_and_devices_of_a_mesh(mesh_of_two):
    params = stacked()
    hosts = jax.tree.map(np.asarray, params)
    structs = jax.eval_shape(unstack_layers, params)
    assert [leaf.shape for leaf in jax.tree.leaves(structs["layers"])] == [(64, 32)] * 3
    spread = jax.device_put(params, mesh_of_two)
    for each in (hosts, spread):
        for one, other in zip(
            arrays(unstack_layers(each)), arrays(unstack_layers(params)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert all(len(one.devices()) == 2 for one in arrays(unstack_layers(spread)))


@pytest.fixture
def mesh_of_two():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.P(None, "x"))


def test_split_layers_are_not_split_again():
    with pytest.raises(ValueError, match="were split before"):
        unstack_layers(unstack_layers(stacked()))
