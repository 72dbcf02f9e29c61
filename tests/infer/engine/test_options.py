"""The sizes of an engine, checked when they are given."""

import numpy as np
import pytest

from infer.engine.options import EngineOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_slots", 0),
        ("max_slots", True),
        ("max_slots", None),
        ("max_slots", 2.0),
        ("max_context", 2**24 + 1),
        ("num_blocks", np.float64(8)),
        ("draft_tokens", -1),
        ("draft_tokens", np.True_),
        ("prefill_share", 0),
        ("prefill_share", 1.5),
        ("prefill_share", "half"),
        ("piece_tokens", 40),
        ("cache", "heap"),
    ],
)
def test_an_option_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is"):
        EngineOptions(**{name: value})


def test_numbers_of_numpy_are_numbers():
    given = {"max_slots": np.int64(2), "max_context": np.uint16(64), "draft_tokens": np.int8(0)}
    options = EngineOptions(prefill_share=np.float32(0.5), **given)
    assert options == EngineOptions(max_slots=2, max_context=64, draft_tokens=0, prefill_share=0.5)
    assert {type(getattr(options, name)) for name in given} == {int}
    assert type(options.prefill_share) is float
