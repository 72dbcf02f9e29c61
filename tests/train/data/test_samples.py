"""Rows of batches: shift, mask, segments, positions; and which samples share a row."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.model.losses import next_token_loss
from llama_jax.model.transformer import forward
from tests.tiny import FAMILIES, tiny_params
from train.data.packing import first_fit, pack
from train.data.samples import Sample, Samples, make_row, stack_rows


def sample(ids, mask=None) -> Sample:
    mask = np.ones(len(ids), np.uint8) if mask is None else np.asarray(mask, np.uint8)
    return Sample(np.asarray(ids, np.int32), mask)


def test_r39_each_position_is_scored_against_the_next_id():
    row = make_row([sample([10, 11, 12, 13])], 4, pad_token_id=0)
    assert row.tokens.tolist() == [10, 11, 12, 13]
    assert row.targets.tolist()[:3] == [11, 12, 13]
    assert row.loss_mask.tolist() == [1, 1, 1, 0]


def test_r33_padding_is_told_by_length_not_by_id():
    """The end token 2 is also the padding id: predicting it counts, the padding does not."""
    row = make_row([sample([5, 6, 2])], 5, pad_token_id=2)
    assert row.tokens.tolist() == [5, 6, 2, 2, 2]
    assert row.targets.tolist()[:2] == [6, 2]
    assert row.loss_mask.tolist() == [1, 1, 0, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 0, 0]


def test_untrained_tokens_are_no_targets():
    row = make_row([sample([5, 6, 7, 8], [0, 0, 1, 1])], 4, pad_token_id=0)
    assert row.loss_mask.tolist() == [0, 1, 1, 0]


def test_r37_weights_of_a_packed_row_are_zero_or_one():
    row = make_row([sample([5, 6]), sample([7, 8]), sample([9])], 6, pad_token_id=0)
    assert row.segment_ids.tolist() == [1, 1, 2, 2, 3, 0]
    # The last token of each segment predicts nothing: neither the next sample nor padding.
    assert row.loss_mask.tolist() == [1, 0, 1, 0, 0, 0]
    real = (row.segment_ids > 0).astype(np.float32)
    assert real.sum() == 5.0
    assert (real * 1.0).sum() / real.sum() == 1.0


def test_r38_packed_documents_do_not_see_each_other():
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    b = sample([20, 21, 22])

    def logits_of(samples, length):
        batch = stack_rows([make_row(samples, length, pad_token_id=0)])
        return batch, forward(
            config,
            params,
            jnp.asarray(batch.tokens),
            positions=jnp.asarray(batch.positions),
            segment_ids=jnp.asarray(batch.segment_ids),
        )

    batch, packed = logits_of([sample([10, 11, 12]), b], 6)
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2]]
    _, changed = logits_of([sample([90, 91, 92]), b], 6)
    _, alone = logits_of([b], 3)
    np.testing.assert_array_equal(packed[:, 3:], changed[:, 3:])
    np.testing.assert_allclose(packed[:, 3:], alone, atol=1e-5)


def test_a_packed_row_has_the_loss_of_its_samples():
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    samples = [sample([10, 11, 12, 13], [0, 0, 1, 1]), sample([20, 21, 22])]

    def loss_of(rows):
        batch = stack_rows(rows)
        return [float(x) for x in next_token_loss(config, params, batch, compute=Compute())[:2]]

    packed = loss_of([make_row(samples, 9, pad_token_id=0)])
    apart = loss_of([make_row([s], 9, pad_token_id=0) for s in samples])
    np.testing.assert_allclose(packed, apart, rtol=1e-5)
    assert packed[1] == 4.0


def test_a_row_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="4 tokens do not fit a row of 3"):
        make_row([sample([1, 2]), sample([3, 4])], 3, pad_token_id=0)


def test_samples_are_held_end_to_end():
    samples = Samples([sample([1, 2, 3], [0, 1, 1]), sample([4], [1]), sample([5, 6], [1, 1])])
    assert len(samples) == 3
    assert [s.ids.tolist() for s in samples] == [[1, 2, 3], [4], [5, 6]]
    assert samples[-1].mask.tolist() == [1, 1]
    assert samples[0:2][1].ids.tolist() == [4]
    assert samples.lengths.tolist() == [3, 1, 2]
    with pytest.raises(IndexError):
        samples[3]
    assert len(Samples([])) == 0


def test_first_fit_is_first_fit():
    assert first_fit([5, 7, 5, 2, 4, 2, 5, 1, 6], 10).tolist() == [0, 1, 0, 1, 2, 2, 3, 1, 4]
    assert first_fit([], 10).tolist() == []
    assert first_fit([10, 10], 10).tolist() == [0, 1]
    with pytest.raises(ValueError, match="sample 1 has 11 tokens"):
        first_fit([1, 11], 10)


def test_first_fit_equals_the_plain_search():
    lengths = np.random.default_rng(0).integers(1, 33, 300).tolist()
    groups, room = [], []
    for length in lengths:
        fitting = [group for group, free in enumerate(room) if free >= length]
        if not fitting:
            room.append(32)
        group = fitting[0] if fitting else len(room) - 1
        groups.append(group)
        room[group] -= length
    assert first_fit(lengths, 32).tolist() == groups


def test_packing_puts_the_longest_first_and_keeps_the_order_of_numbers():
    groups = pack(np.asarray([2, 3, 9, 8, 1, 5]), 10, first=100)
    # 9+1 and 8+2 and 5+3: row by row in the order of their first samples.
    assert list(groups) == [[100, 103], [101, 105], [102, 104]]
    assert len(pack(np.zeros(0, np.int64), 10)) == 0
    with pytest.raises(IndexError):
        groups[3]


@pytest.mark.parametrize("shape", ["uniform", "lognormal", "short"])
def test_mixed_lengths_fill_rows_to_97_percent(shape):
    rng = np.random.default_rng(0)
    lengths = {
        "uniform": rng.integers(1, 2049, 2000),
        "lognormal": np.clip(rng.lognormal(5.5, 1.0, 2000).astype(int), 4, 2048),
        "short": np.clip(rng.lognormal(4.3, 0.6, 500).astype(int), 4, 2048),
    }[shape]
    groups = pack(lengths, 2048)
    assert sorted(groups.members.tolist()) == list(range(len(lengths)))
    filled = [int(lengths[group].sum()) for group in groups]
    assert max(filled) <= 2048
    assert lengths.sum() / (2048 * len(groups)) >= 0.97


def test_the_fingerprint_is_of_ids_masks_and_borders():
    def of(*samples):
        return Samples(samples).fingerprint

    one = of(sample([1, 2, 3]), sample([4]))
    assert one == of(sample([1, 2, 3]), sample([4]))
    others = {
        of(sample([1, 2]), sample([3, 4])),
        of(sample([4]), sample([1, 2, 3])),
        of(sample([1, 2, 3], [0, 1, 1]), sample([4])),
        of(sample([1, 2, 4]), sample([4])),
    }
    assert len(others) == 4 and one not in others
