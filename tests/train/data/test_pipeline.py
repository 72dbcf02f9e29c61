"""The order of rows: deterministic, found again, new in every epoch, nothing lost."""

import json
from collections import Counter

import numpy as np
import pytest

from train.data.pipeline import TrainingBatches, evaluation_batches, plan_rows, split_rows
from train.data.samples import Sample, Samples


def plan(count: int = 41, packing: bool = True):
    """Sample number n holds the id n over and over, so that batches show who is in them."""
    lengths = np.random.default_rng(0).integers(1, 9, count)
    samples = Samples(
        [Sample(np.full(n, i, np.int32), np.ones(n, np.uint8)) for i, n in enumerate(lengths)]
    )
    return plan_rows(samples, sequence_length=16, packing=packing, pad_token_id=0)


def batches(packing: bool = True, seed: int = 3, shuffle: bool = True) -> TrainingBatches:
    return TrainingBatches(plan(packing=packing), batch_size=3, shuffle=shuffle, seed=seed)


def ids_of(iterator: TrainingBatches, count: int) -> list[list[int]]:
    found = []
    for _ in range(count):
        batch = next(iterator)
        seen = set(batch.tokens[batch.segment_ids > 0].tolist())
        assert seen == set(iterator.samples)
        found.append(list(iterator.samples))
    return found


def flat_ids(iterator: TrainingBatches, count: int) -> list[int]:
    return [sample for batch in ids_of(iterator, count) for sample in batch]


@pytest.mark.parametrize("packing", [False, True])
def test_r64_a_resumed_iterator_gives_the_same_ids(packing):
    whole = ids_of(batches(packing), 20)
    first = batches(packing)
    start = ids_of(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    second = batches(packing)
    second.set_state(state)
    assert start + ids_of(second, 13) == whole


def test_r64_epochs_have_every_sample_once_in_orders_of_their_own():
    rows = len(plan(packing=False).groups)
    per_epoch = rows  # batch size 3: three epochs are `rows` batches
    flat = flat_ids(batches(packing=False), per_epoch)
    epochs = [flat[start : start + rows] for start in range(0, 3 * rows, rows)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(rows))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(rows))
    assert flat == flat_ids(batches(packing=False), per_epoch), "and the same again"
    assert flat != flat_ids(batches(packing=False, seed=4), per_epoch)


def test_without_shuffling_rows_come_in_order():
    assert ids_of(batches(packing=False, shuffle=False), 2) == [[0, 1, 2], [3, 4, 5]]


def test_evaluation_has_every_row_once_and_fills_up_with_padding():
    rows = plan(packing=False)
    found = list(evaluation_batches(rows, batch_size=8))
    assert all(batch.tokens.shape == (8, 16) for batch in found)
    seen = [i for b in found for i in b.tokens[b.segment_ids > 0].tolist()]
    assert Counter(seen) == Counter(dict(enumerate(rows.samples.lengths.tolist())))
    filler = found[-1].segment_ids[41 % 8 :]
    assert not filler.any() and not found[-1].loss_mask[41 % 8 :].any()


def test_splitting_is_a_partition_decided_by_the_seed():
    rows = list(range(50))
    train, held_out = split_rows(rows, 0.2, 7)
    assert sorted(train + held_out) == rows and len(held_out) == 10
    assert train == sorted(train)
    assert split_rows(rows, 0.2, 7) == (train, held_out)
    assert split_rows(rows, 0.2, 8) != (train, held_out)
    assert len(split_rows(rows, 0.001, 0)[1]) == 1
    with pytest.raises(ValueError, match="at least two rows"):
        split_rows([1], 0.5, 0)


def test_nothing_to_batch_is_an_error():
    empty = plan_rows(Samples([]), sequence_length=4, packing=True, pad_token_id=0)
    with pytest.raises(ValueError, match="no rows"):
        TrainingBatches(empty, batch_size=1, shuffle=True, seed=0)
