"""Where tokens stand in their rows and segments."""

import jax.numpy as jnp

from llama_jax.model.context import positions_of, restarted_positions


def test_positions_begin_anew_in_each_segment():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2], [3, 1, 1, 0, 0, 0]])
    wanted = [[0, 1, 2, 0, 1, 2], [0, 0, 1, 0, 1, 2]]
    assert restarted_positions(segments).tolist() == wanted
    assert positions_of(segments, segments).tolist() == wanted
    assert positions_of(segments, None).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
