"""The order of rows: deterministic, found again, new in every epoch, nothing lost."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from train.data.mixture import Mixture
from train.data.pipeline import TrainingBatches, evaluation_batches, plan_rows
from train.data.row_set import held_out_rows
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
    held = held_out_rows(50, 0.2, 7)
    assert held.dtype == bool and held.shape == (50,) and held.sum() == 10
    np.testing.assert_array_equal(held, held_out_rows(50, 0.2, 7))
    assert (held != held_out_rows(50, 0.2, 8)).any()
    assert held_out_rows(50, 0.001, 0).sum() == 1
    with pytest.raises(ValueError, match="at least two rows"):
        held_out_rows(1, 0.5, 0)


def test_nothing_to_batch_is_an_error():
    empty = plan_rows(Samples([]), sequence_length=4, packing=True, pad_token_id=0)
    with pytest.raises(ValueError, match="no rows"):
        TrainingBatches(empty, batch_size=1, shuffle=True, seed=0)


def mixed_plan(packing: bool = True, rows_per_item: int = 1):
    """Sources of 10, 30 and 60 samples with weights 3, 2 and 1; samples hold their number."""
    lengths = np.random.default_rng(1).integers(1, 9, 100)
    return plan_rows(
        Samples(
            [Sample(np.full(n, i, np.int32), np.ones(n, np.uint8)) for i, n in enumerate(lengths)]
        ),
        sequence_length=16,
        packing=packing,
        pad_token_id=0,
        parts=[("a", 10, 3.0), ("b", 30, 2.0), ("c", 60, 1.0)],
        rows_per_item=rows_per_item,
    )


def mixed(packing: bool = True, batch_size: int = 4, **options) -> TrainingBatches:
    rows_per_item = options.pop("rows_per_item", 1)
    plan = mixed_plan(packing, rows_per_item)
    return TrainingBatches(plan, batch_size=batch_size, shuffle=True, seed=5, **options)


@pytest.mark.parametrize("weights", [[1.0], [3.0, 2.0, 1.0], [0.1, 0.7, 0.15, 0.05], [1e-6, 1.0]])
def test_a_mixture_deals_every_item_once_and_in_proportion(weights):
    mixture, seen = Mixture(weights), [0] * len(weights)
    for number in range(2000):
        assert mixture.counts(number) == seen
        source, place = mixture.locate(number)
        assert place == seen[source], "a source's own items come one after another"
        seen[source] += 1
        for count, weight in zip(seen, weights, strict=True):
            assert abs(count - (number + 1) * weight / sum(weights)) <= 1
    far = 10**12
    source, place = mixture.locate(far)
    assert mixture.counts(far)[source] == place, "no walk, so no place is far"


def test_weights_set_the_shares_of_batches_and_epochs_of_each_source_are_whole():
    iterator = mixed(packing=False, batch_size=6)
    seen = Counter(flat_ids(iterator, 20))
    assert sum(seen[i] for i in range(10)) == 60
    assert all(seen[i] == 6 for i in range(10)), "ten rows, sixty items: six epochs"
    assert sum(seen[i] for i in range(10, 40)) == 40
    assert {seen[i] for i in range(10, 40)} == {1, 2}
    assert sum(seen[i] for i in range(40, 100)) == 20
    assert iterator.progress() == {
        "a": {"items": 60, "epochs": 6.0},
        "b": {"items": 40, "epochs": 40 / 30},
        "c": {"items": 20, "epochs": 20 / 60},
    }


def test_packed_rows_hold_samples_of_one_source():
    plan = mixed_plan()
    for share in plan.shares:
        members = {
            sample
            for item in range(share.first, share.first + share.count)
            for row in plan.item_rows(item)
            for sample in plan.groups[row]
        }
        expected = {"a": range(10), "b": range(10, 40), "c": range(40, 100)}[share.name]
        assert members == set(expected)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("options", [{}, {"prefetch": 3, "num_workers": 2}], ids=["now", "ahead"])
def test_r64_a_resumed_mixture_goes_on_with_the_next_row(packing, options):
    """Over several epochs of the smallest source; reading ahead never shows in the state."""
    whole = ids_of(mixed(packing), 40)
    iterator = mixed(packing, **options)
    found = []
    for stop in (1, 7, 13, 19):
        found += ids_of(iterator, stop)
        state = json.loads(json.dumps(iterator.get_state()))
        assert state["batches"] == len(found)
        next(iterator)  # what is handed out after the save is handed out again
        iterator = mixed(packing, **options)
        iterator.set_state(state)
    assert found == whole


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("pairs", [False, True])
def test_processes_share_the_global_batch(count, pairs):
    """Each has its rows of the very batch one process would have; ids and state are the same."""
    shape = {"packing": False, "rows_per_item": 2} if pairs else {}
    alone = mixed(**shape)
    processes = [
        mixed(process_index=p, process_count=count, prefetch=p, **shape) for p in range(count)
    ]
    for step in range(15):
        if step == 6:  # stop and go on, with a state from any of them
            state = processes[-1].get_state()
            assert all(process.get_state() == state for process in processes)
            assert state == alone.get_state()
            for process in processes:
                process.set_state(state)
        whole, parts = next(alone), [next(process) for process in processes]
        assert len(whole.tokens) == (8 if pairs else 4)
        for name in ("tokens", "targets", "loss_mask", "segment_ids", "positions"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        assert all(process.samples == alone.samples for process in processes)


def test_pairs_stay_together():
    iterator = mixed(packing=False, rows_per_item=2)
    for _ in range(20):
        next(iterator)
        first, second = iterator.samples[::2], iterator.samples[1::2]
        assert [(i, i + 1) for i in first] == list(zip(first, second, strict=True))
        assert all(i % 2 == 0 for i in first)


def test_processes_share_evaluation_batches():
    rows = plan(packing=False)
    whole = list(evaluation_batches(rows, batch_size=8))
    parts = [
        list(evaluation_batches(rows, batch_size=8, process_index=p, process_count=2))
        for p in range(2)
    ]
    for batch, *local in zip(whole, *parts, strict=True):
        joined = np.concatenate([part.tokens for part in local])
        np.testing.assert_array_equal(joined, batch.tokens)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch of 4 cannot be dealt out evenly to 3 processes"):
        mixed(process_count=3)


def test_a_state_of_other_data_is_refused():
    state = mixed().get_state()
    with pytest.raises(ValueError, match="training data is not that of the run"):
        mixed(packing=False).set_state(state)
    with pytest.raises(ValueError, match="training data is not that of the run"):
        batches().set_state(state)


def test_a_state_of_other_evaluation_rows_is_refused():
    state = mixed(evaluation="a").get_state()
    mixed(evaluation="a").set_state(state)
    for other in ("b", None):
        with pytest.raises(ValueError, match="evaluation rows are not those of the run"):
            mixed(evaluation=other).set_state(state)
    del state["evaluation"]  # as older runs have it
    mixed(evaluation="b").set_state(state)


def test_every_part_of_a_plan_is_in_its_fingerprint():
    plans = [plan(41), plan(40), plan(41, packing=False), mixed_plan()]
    plans.append(dataclasses.replace(plan(41), sequence_length=32))
    plans.append(dataclasses.replace(plan(41), pad_token_id=1))
    plans.append(dataclasses.replace(mixed_plan(), shares=mixed_plan().shares[::-1]))
    assert len({p.fingerprint for p in plans}) == len(plans)
    assert plan(41).fingerprint == plan(41).fingerprint


def test_an_error_in_a_thread_reaches_the_reader():
    broken = mixed(prefetch=2)
    broken._plan.samples._ends.setflags(write=True)
    broken._plan.samples._ends[1:] += 1000
    with pytest.raises(ValueError, match="do not fit"):
        for _ in range(50):
            next(broken)


def test_a_place_saved_in_another_form_is_refused():
    batches = TrainingBatches.__new__(TrainingBatches)
    with pytest.raises(ValueError, match="fields next_index"):
        batches.set_state({"next_index": 3})
