"""Goodput over the restarts of a run."""

import json

import pytest

from train.attempts import RUN_CAUSES, Attempts
from train.goodput import CAUSES


def summary(**seconds):
    return {
        "wall_seconds": float(sum(seconds.values())),
        "seconds": {**dict.fromkeys(CAUSES, 0.0), **{k: float(v) for k, v in seconds.items()}},
    }


def test_one_attempt_is_its_own_total(tmp_path):
    path = tmp_path / "goodput.json"
    attempts = Attempts(path, first_step=0, now=lambda: 1000.0)
    attempts.write(summary(step=1, other=1), 1)
    whole = attempts.write(summary(step=60, eval=15, other=25), 10)
    assert (whole["wall_seconds"], whole["goodput"], whole["loop_goodput"]) == (100, 0.6, 0.8)
    assert json.loads(path.read_text()) == whole
    (only,) = whole["attempts"]
    assert (only["began"], only["first_step"], only["last_step"]) == (900, 0, 10)
    assert set(whole["seconds"]) == set(RUN_CAUSES)


def test_time_between_attempts_is_down_and_repeated_steps_are_lost(tmp_path):
    path = tmp_path / "goodput.json"
    # Ten steps by time 1000, then killed; the checkpoint was behind step 8.
    Attempts(path, first_step=0, now=lambda: 1000.0).write(summary(step=100), 10)
    # From 1050 on, eight more steps.
    whole = Attempts(path, first_step=8, now=lambda: 1140.0).write(summary(step=80, resume=10), 16)
    assert whole["seconds"]["lost"] == 20 and whole["seconds"]["down"] == 50
    assert whole["seconds"]["step"] == 160 and whole["seconds"]["resume"] == 10
    assert whole["wall_seconds"] == 240 == sum(whole["seconds"].values())
    assert whole["goodput"] == 160 / 240 and whole["loop_goodput"] == 160 / 180
    assert len(whole["attempts"]) == 2


def test_a_process_that_found_all_done_is_no_attempt(tmp_path):
    path = tmp_path / "goodput.json"
    before = Attempts(path, first_step=0, now=lambda: 100.0).write(summary(step=50), 5)
    after = Attempts(path, first_step=5, now=lambda: 900.0).write(summary(other=9), 5)
    assert after == before


def test_clocks_that_disagree_and_attempts_without_a_step(tmp_path):
    path = tmp_path / "goodput.json"
    Attempts(path, first_step=0, now=lambda: 1000.0).write(summary(compile=100), 0)
    whole = Attempts(path, first_step=0, now=lambda: 1010.0).write(summary(step=50), 5)
    assert whole["seconds"]["down"] == 0 and whole["seconds"]["lost"] == 0
    assert whole["wall_seconds"] == 150


def test_a_run_gone_back_further_than_an_attempt_loses_all_of_it(tmp_path):
    path = tmp_path / "goodput.json"
    Attempts(path, first_step=8, now=lambda: 100.0).write(summary(step=20), 10)
    whole = Attempts(path, first_step=4, now=lambda: 200.0).write(summary(step=100), 10)
    assert whole["seconds"]["lost"] == 20 and whole["seconds"]["step"] == 100


def test_a_broken_file_is_an_error_and_not_forgotten(tmp_path):
    path = tmp_path / "goodput.json"
    path.write_text("{")
    with pytest.raises(ValueError):
        Attempts(path, first_step=0)
