"""The TPU kernel, interpreted on a CPU, equals the reference; what it cannot do it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import DEFAULT_RULES, Compute
from llama_jax.kernels import splash
from llama_jax.mesh.sequence import balanced_places
from llama_jax.mesh.sharding import make_mesh
from llama_jax.model import transformer
from llama_jax.model.attention import attend, causal_mask
from tests.tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

LENGTH, SIZE = 128, 128


def operands(batch=2, heads=4, kv_heads=2, size=SIZE):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, LENGTH, n, size) for n in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def reference(query, key, value, segment_ids, window):
    places = jnp.arange(LENGTH)[None]
    mask = causal_mask(
        places,
        places,
        sliding_window=window,
        query_segments=segment_ids,
        key_segments=segment_ids,
    )
    return attend(query, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), mask)


SEGMENTS = np.repeat([[1] * 40 + [2] * 60 + [0] * 28], 2, axis=0).astype(np.int32)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("segments", "size"), [(None, SIZE), (SEGMENTS, SIZE), (SEGMENTS, 64), (None, 80)]
)
def test_equals_the_reference_forward_and_backward(window, segments, size):
    arrays = operands(size=size)
    ids = None if segments is None else jnp.asarray(segments)

    def ours(q, k, v):
        return splash.attend(
            q, k, v, ids, sliding_window=window, rules=DEFAULT_RULES, interpret=True
        )

    def loss(f):
        return lambda *arrays: jnp.sum(jnp.sin(f(*arrays)))

    expected = reference(*arrays, ids, window)
    np.testing.assert_allclose(ours(*arrays), expected, atol=2e-5)
    got = jax.grad(loss(ours), argnums=(0, 1, 2))(*arrays)
    plain = jax.grad(loss(lambda q, k, v: reference(q, k, v, ids, window)), argnums=(0, 1, 2))
    for a, b in zip(got, plain(*arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_sharded_over_rows_and_heads_equals_one_device():
    arrays = operands(batch=4)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})

    def run(q, k, v):
        return splash.attend(
            q, k, v, None, sliding_window=None, rules=DEFAULT_RULES, interpret=True
        )

    with jax.set_mesh(mesh):
        sharded = jax.jit(run)(*arrays)
    np.testing.assert_allclose(sharded, run(*arrays), atol=1e-6)


def test_the_model_takes_the_kernel_when_told(monkeypatch):
    config = tiny_config(head_dim=128, num_hidden_layers=1)
    params, tokens = tiny_params(config), tiny_tokens(1, LENGTH)
    calls = []

    def interpreted(*args, attend=splash.attend, **kwargs):
        calls.append(args)
        return attend(*args, **kwargs, interpret=True)

    monkeypatch.setattr(splash, "attend", interpreted)
    compute = dataclasses.replace(Compute(), attention="splash")
    got = transformer.forward(config, params, tokens, compute=compute)
    assert calls
    np.testing.assert_allclose(got, transformer.forward(config, params, tokens), atol=1e-4)


def test_a_length_the_kernel_cannot_take_is_refused():
    x = jnp.ones((1, 100, 2, 128))
    with pytest.raises(ValueError, match="multiple of 128, not 100"):
        splash.attend(x, x, x, None, sliding_window=None, rules=DEFAULT_RULES)


@pytest.mark.parametrize("window", [None, 9, 200])
@pytest.mark.parametrize("length", [256, 384, 1024, 1536])
def test_the_visited_share_is_that_of_blocks_with_something_to_see(length, window):
    block = 512 if length % 512 == 0 else 256 if length % 256 == 0 else 128
    places = jnp.arange(length)[None]
    mask = np.asarray(causal_mask(places, places, sliding_window=window))[0]
    count = length // block
    blocks = mask.reshape(count, block, count, block).any(axis=(1, 3))
    assert splash.visited_share(length, window) == blocks.mean()


@pytest.mark.parametrize("window", [None, 300])
def test_divided_sequences_equal_one_device(window):
    """Queries in balanced order on each device, keys gathered into that of the text."""
    length = 1024
    shapes = [(2, length, heads, SIZE) for heads in (4, 2, 2)]
    keys = jax.random.split(jax.random.key(1), 3)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    ids = jnp.asarray([[1] * 300 + [2] * 700 + [0] * 24] * 2, jnp.int32)
    order = balanced_places(length, 4)

    def loss(q, k, v, ids):
        mixed = splash.attend(
            q, k, v, ids, sliding_window=window, rules=DEFAULT_RULES, interpret=True
        )
        return jnp.sum(jnp.sin(mixed)), mixed

    gradients = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    expected, plain = gradients(*arrays, ids)
    with jax.set_mesh(make_mesh({"tensor": 2, "context": 4})):
        got, mixed = jax.jit(gradients)(*(x[:, order] for x in arrays), ids[:, order])
    np.testing.assert_allclose(mixed, plain[:, order], atol=2e-5)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs[:, order], atol=1e-4)
