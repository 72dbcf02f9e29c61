"""Moments in the host's memory: the same numbers, and the devices hold none between steps."""

import jax
import pytest

from tests.train.test_loop import config, same_bits
from train import resume
from train.loop import train

HOST = {"learning_rate": 0.01, "weight_decay": 0.1, "offload": True}


def kinds(tree):
    return {array.sharding.memory_kind for array in jax.tree.leaves(tree) if array.ndim}


@pytest.mark.slow
def test_a_run_with_moments_on_the_host_equals_one_without(tmp_path, monkeypatch):
    for name in ("plain", "host"):
        (tmp_path / name).mkdir()
    plain = train(config(tmp_path / "plain"))
    seen = []

    def first_state(*arguments):
        seen.append(state := original(*arguments))
        return state

    original = resume.first_state
    monkeypatch.setattr("train.loop.first_state", first_state)
    offloaded = config(tmp_path / "host", optimizer=HOST)
    train(offloaded, stop_after=2)
    result = train(offloaded)
    assert [kinds(state.opt_state.inner) for state in seen] == [{"pinned_host"}] * 2
    assert [kinds(state.params) for state in seen] == [{"device"}] * 2
    same_bits(result.params, plain.params)
    assert result.final_loss == plain.final_loss


def test_pmap_refuses_it(tmp_path):
    with pytest.raises(ValueError, match="optimizer.offload is true, but distill.step pmap"):
        config(
            tmp_path,
            method="distill",
            distill={"teacher": "smollm2-135m", "step": "pmap"},
            mesh={"cpu_devices": 1},
            optimizer=HOST,
        )
