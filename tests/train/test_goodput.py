"""Every nanosecond of a run has one cause."""

import random

import pytest

from train.goodput import CAUSES, Goodput


class Hand:
    """A clock that moves when told to."""

    def __init__(self):
        self.now = 17

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += round(seconds * 1e9)


def test_each_cause_gets_its_time_and_the_rest_is_other():
    clock = Hand()
    goodput = Goodput(clock=clock)
    clock.wait(1)
    with goodput.cause("compile"):
        clock.wait(2)
    for _ in range(3):
        with goodput.cause("step"):
            clock.wait(4)
    summary = goodput.summary()
    assert summary["wall_seconds"] == 15
    assert {k: v for k, v in summary["seconds"].items() if v} == {
        "other": 1,
        "compile": 2,
        "step": 12,
    }
    assert summary["goodput"] == 12 / 15
    assert summary["loop_goodput"] == 1.0


def test_an_inner_block_takes_its_time_from_the_outer():
    clock = Hand()
    goodput = Goodput(clock=clock)
    with goodput.cause("loop"):
        clock.wait(1)
        with goodput.cause("eval"):
            clock.wait(10)
            with goodput.cause("compile"):
                clock.wait(100)
            clock.wait(20)
        clock.wait(2)
    seconds = goodput.summary()["seconds"]
    assert (seconds["loop"], seconds["eval"], seconds["compile"]) == (3, 30, 100)


def test_a_block_that_raises_is_counted_and_closed():
    clock = Hand()
    goodput = Goodput(clock=clock)
    with pytest.raises(RuntimeError), goodput.cause("save"):
        clock.wait(5)
        raise RuntimeError
    clock.wait(1)
    seconds = goodput.summary()["seconds"]
    assert (seconds["save"], seconds["other"]) == (5, 1)


def test_the_summary_includes_the_open_block_and_changes_nothing():
    clock = Hand()
    goodput = Goodput(clock=clock)
    with goodput.cause("step"):
        clock.wait(3)
        assert goodput.summary()["seconds"]["step"] == 3
        clock.wait(4)
    assert goodput.summary()["seconds"]["step"] == 7
    assert goodput.summary() == goodput.summary()


def test_causes_add_up_exactly_whatever_happens():
    rng, clock = random.Random(5), Hand()
    goodput = Goodput(clock=clock)
    start = clock.now

    def spend(depth):
        clock.now += rng.randrange(10**12)
        for _ in range(rng.randrange(3) if depth < 5 else 0):
            with goodput.cause(rng.choice(list(CAUSES))):
                spend(depth + 1)
        clock.now += rng.randrange(10**3)

    for _ in range(50):
        spend(0)
    summary = goodput.summary()
    assert summary["wall_seconds"] == (clock.now - start) / 1e9
    total = sum(round(seconds * 1e9) for seconds in summary["seconds"].values())
    assert total == clock.now - start


def test_nothing_has_passed_yet():
    summary = Goodput(clock=lambda: 5).summary()
    assert (summary["wall_seconds"], summary["goodput"], summary["loop_goodput"]) == (0, 0, 0)


def test_an_unknown_cause_is_refused_and_charges_nothing():
    clock = Hand()
    goodput = Goodput(clock=clock)
    refusal = pytest.raises(ValueError, match="'steps' is no cause of time; causes are step, data")
    with refusal, goodput.cause("steps"):
        pass
    clock.wait(1)
    assert goodput.summary()["seconds"]["other"] == 1


def test_it_counts_real_time_by_default():
    goodput = Goodput()
    with goodput.cause("data"):
        sum(range(1000))
    assert 0 < goodput.summary()["seconds"]["data"] < 60
