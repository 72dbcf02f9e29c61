"""Attention over slots against the reference, and rows that do not depend on their neighbours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.attention import attend, causal_mask
from llama_jax.model.cache import NEVER
from llama_jax.model.slot_cache import TILE, SlotRows, attend_slots

HEADS, KV_HEADS, SIZE = 6, 2, 16
CAPACITY = 3 * TILE
NUM_SLOTS = 27


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def step(batch: int, first: int, lengths: np.ndarray, window: int | None) -> Any:
    """One new token in each of `batch` slots from number `first` on, of rows of so many tokens."""
    layer = (
        random(0, NUM_SLOTS, KV_HEADS, SIZE, CAPACITY),
        random(1, NUM_SLOTS, KV_HEADS, CAPACITY, SIZE),
    )
    positions = jnp.asarray(lengths - 1, jnp.int32)[:, None]
    real = lengths[lengths <= CAPACITY]
    rows = SlotRows(jnp.int32(first), positions, jnp.int32(real.max()))
    query = random(2, NUM_SLOTS, 1, HEADS, SIZE)[first : first + batch]
    new = random(3, 2, NUM_SLOTS, 1, KV_HEADS, SIZE)[:, first : first + batch]
    run = jax.jit(lambda *each: attend_slots(*each, rows, sliding_window=window))
    mixed, layer = run(query, *new, layer)
    return query, mixed, layer


@pytest.mark.parametrize(("batch", "window"), [(1, None), (8, 40), (13, None), (24, 40)])
def test_rows_of_every_length_attend_as_in_the_reference(batch: int, window: int | None) -> None:
    lengths = np.random.default_rng(batch).integers(1, CAPACITY, batch)
    first = 2
    query, mixed, (keys, values) = step(batch, first, lengths, window)
    mask = causal_mask(
        jnp.asarray(lengths - 1)[:, None], jnp.arange(CAPACITY)[None], sliding_window=window
    )
    slots = slice(first, first + batch)
    wanted = attend(query, keys[slots], values[slots], mask)
    np.testing.assert_allclose(mixed, wanted, atol=2e-6)


def test_rows_give_the_same_bits_whoever_runs_beside_them() -> None:
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 24)
    _, all_of_them, _ = step(24, 0, lengths, None)
    for batch in (8, 13):
        _, some, _ = step(batch, 0, lengths[:batch], None)
        np.testing.assert_array_equal(some, all_of_them[:batch])


def test_rows_that_fill_a_step_up_stay_finite() -> None:
    lengths = np.full(16, NEVER + 1)
    lengths[3] = 5
    _, mixed, (keys, _) = step(16, 0, lengths, None)
    assert np.isfinite(mixed).all()
    np.testing.assert_array_equal(keys[4:], random(0, NUM_SLOTS, KV_HEADS, SIZE, CAPACITY)[4:])
