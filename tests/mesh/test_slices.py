"""The TPU compiler, on this machine, takes the model; names of slices are checked."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.mesh.sharding import batch_sharding, make_mesh, shardings
from llama_jax.mesh.slices import slice_devices, slice_named
from llama_jax.model.losses import Batch, next_token_loss
from llama_jax.weights.table import abstract_params
from tests.tiny import tiny_config

pytest.importorskip("libtpu", reason="the TPU compiler is on Linux x86-64 only")


def compiled_gradient(dtype):
    """(parameters, the gradient of three layers of them, computed in bfloat16 on four chips)."""
    config = tiny_config(
        hidden_size=512,
        head_dim=128,
        intermediate_size=1024,
        vocab_size=1024,
        num_hidden_layers=3,
        dtype=dtype,
    )
    mesh = make_mesh({"fsdp": 4}, devices=slice_devices("v5e-4"))
    params = abstract_params(config)
    places = shardings(config, params, mesh)

    def placed(array, place: NamedSharding):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    params = jax.tree.map(placed, params, places)
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh))
    batch = Batch(ids, ids, ids, ids, ids)
    compute = Compute(dtype="bfloat16", remat="full", attention="splash")

    def gradient(params, batch):
        return jax.grad(lambda p: next_token_loss(config, p, batch, compute=compute)[0])(params)

    with jax.set_mesh(mesh):
        return params, jax.jit(gradient, out_shardings=places).lower(params, batch).compile()


def test_a_gradient_compiles_for_four_chips_and_keeps_its_sharding():
    params, compiled = compiled_gradient("bfloat16")
    memory = compiled.memory_analysis()
    # Each chip holds its quarter of the parameters and little else.
    quarter = tree.num_bytes(params) / 4
    assert quarter < memory.argument_size_in_bytes < 1.1 * quarter + 100_000
    # The layers' weights are gathered one layer at a time, from bfloat16.
    assert "all-gather" in compiled.as_text()


def test_float32_weights_are_rounded_one_layer_at_a_time():
    text = compiled_gradient("float32")[1].as_text()
    assert re.search(r"f32\[3,\d+,\d+\]", text)  # the matrices of all layers
    assert not re.search(r"bf16\[3,\d+,\d+\]", text)


@pytest.mark.parametrize("name", ["v4-4", "v5e-1", "v5p-4", "v6e-8", "tpu7x-4", "2xv5e-4"])
def test_the_compilers_devices_are_those_of_the_slice(name):
    wanted = slice_named(name)
    devices = slice_devices(wanted)
    assert len(devices) == wanted.num_devices
    assert {device.device_kind for device in devices} == {wanted.generation.device_kind}
    mesh = make_mesh({"data": wanted.count, "fsdp": -1}, devices=devices)
    assert mesh.size == wanted.num_devices
    if wanted.count > 1:
        assert {device.slice_index for device in devices} == set(range(wanted.count))


def test_each_slice_takes_a_part_of_the_data_axis():
    devices = slice_devices("2xv5e-4")
    mesh = make_mesh({"data": 4, "fsdp": 2}, devices=devices)
    of_rows = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert of_rows == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="multiple of 2"):
        make_mesh({"fsdp": 8}, devices=devices)
