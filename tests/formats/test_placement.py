"""Arrays filled slice by slice: each slice read once, no copy on a CPU, safe to donate."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax.formats.placement import place
from llama_jax.mesh.sharding import make_mesh, partition_spec

VALUES = np.arange(4 * 8 * 6, dtype=np.float32).reshape(4, 8, 6)


class _Reader:
    def __init__(self, values):
        self.values = values
        self.buffers = []

    def __call__(self, out, index):
        assert all(part.start is not None and part.stop is not None for part in index)
        out[...] = self.values[index]
        self.buffers.append(out)


def _sharding(sizes):
    spec = partition_spec(("layers", "heads", "embed"))
    return jax.sharding.NamedSharding(make_mesh(sizes), spec)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_buffer_becomes_the_array(dtype):
    reader = _Reader(VALUES.astype(dtype))
    array = place(VALUES.shape, np.dtype(dtype), reader, None)
    (buffer,) = reader.buffers
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data
    np.testing.assert_array_equal(array, VALUES.astype(dtype))


@pytest.mark.parametrize(
    ("sizes", "reads", "shape"),
    [
        ({"tensor": 8}, 8, (4, 1, 6)),
        ({"tensor": 4, "fsdp": 2}, 8, (4, 2, 3)),
        ({"data": 4, "fsdp": 2}, 2, (4, 8, 3)),
        ({"data": 8}, 1, (4, 8, 6)),
    ],
)
def test_each_slice_is_read_once(sizes, reads, shape):
    reader = _Reader(VALUES)
    sharding = _sharding(sizes)
    array = place(VALUES.shape, np.dtype(np.float32), reader, sharding)
    assert [buffer.shape for buffer in reader.buffers] == [shape] * reads
    assert array.sharding == sharding
    np.testing.assert_array_equal(array, VALUES)
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, VALUES[shard.index])


@pytest.mark.parametrize("sizes", [None, {"data": 8}, {"tensor": 4, "fsdp": 2}])
def test_donated_buffers_are_not_written_by_two(sizes):
    """Replicas may share a host buffer; an update in place must not show through in it."""
    reader = _Reader(VALUES)
    array = place(VALUES.shape, np.dtype(np.float32), reader, _sharding(sizes) if sizes else None)
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    result = step(step(array))
    np.testing.assert_array_equal(result, (VALUES * 2 + 1) * 2 + 1)
    np.testing.assert_array_equal(
        np.concatenate([b.ravel() for b in reader.buffers]).sum(), VALUES.sum()
    )


def test_arrays_without_a_mesh_are_not_bound_to_a_device():
    array = place((4, 8, 6), np.dtype(np.float32), _Reader(VALUES), None)
    other = jax.device_put(jnp.ones((4, 8, 6)), jax.devices()[3])
    assert (array + other).devices() == {jax.devices()[3]}


def test_nothing_to_read():
    array = place((0, 3), np.dtype(np.float32), _Reader(np.zeros((0, 3), np.float32)), None)
    assert array.shape == (0, 3)
