"""On-policy rows: the prompt stays, the student says the rest, and the draw is the row's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import Compute
from llama_jax.model.transformer import forward
from tests.tiny import tiny_params
from tests.train import test_distill
from tests.train.test_distill import NUM_IDS, SECTION, STUDENT, Case, both, make_loss, random_batch
from train.distill_on_policy import OnPolicy
from train.distill_pmap import AXIS

pytestmark = pytest.mark.compiled_quickly

CONFIG = STUDENT.replace(eos_token_id=(7,))
LENGTH = 10


def prompts(rows=6, seed=0):
    """Rows whose first 3 tokens are a prompt; targets 2 to 7 count."""
    batch = random_batch(rows, LENGTH, seed=seed)
    mask = np.zeros((rows, LENGTH), np.float32)
    mask[:, 2:8] = 1
    return dataclasses.replace(batch, loss_mask=mask)


def sampled(fraction=1.0, temperature=1.0, key=0, first_row=0, batch=None, params=None):
    prepare = OnPolicy(fraction, temperature, NUM_IDS)
    return prepare(
        CONFIG,
        params or tiny_params(CONFIG),
        batch or prompts(),
        jax.random.key(key),
        first_row=first_row,
        compute=Compute(),
    )


def test_near_temperature_0_the_student_says_what_it_finds_likeliest():
    params, batch = tiny_params(CONFIG), prompts()
    found = sampled(temperature=1e-4, params=params, batch=batch)
    tokens = np.asarray(found.tokens)
    np.testing.assert_array_equal(tokens[:, :3], batch.tokens[:, :3])
    logits = np.asarray(forward(CONFIG, params, jnp.asarray(tokens)))[..., :NUM_IDS]
    np.testing.assert_array_equal(tokens[:, 3:], logits.argmax(-1)[:, 2:-1])
    assert not np.array_equal(tokens[:, 3:], batch.tokens[:, 3:])


def test_targets_are_the_next_tokens_up_to_the_end_token():
    found = jax.tree.map(np.asarray, sampled(batch=prompts(64), key=3))
    np.testing.assert_array_equal(found.targets[:, :-1], found.tokens[:, 1:])
    assert (found.labelled == 0).all() and (found.tokens[:, 3:] < NUM_IDS).all()
    ended = 0
    for tokens, mask, segments in zip(
        found.tokens, found.loss_mask, found.segment_ids, strict=True
    ):
        at = np.flatnonzero(tokens[3:] == 7)
        last = 3 + at[0] if len(at) else LENGTH - 1
        ended += len(at) > 0
        expected = np.zeros(LENGTH)
        expected[2:last] = 1
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(segments, np.arange(LENGTH) <= last)
    assert ended, "the seed shows an end token"


def test_only_part_of_the_rows_is_the_students():
    batch = prompts(200)
    found = jax.tree.map(np.asarray, sampled(fraction=0.25, batch=batch))
    own = (found.labelled == 0).all(axis=1)
    assert 0.15 < own.mean() < 0.35
    np.testing.assert_array_equal(found.tokens[~own], batch.tokens[~own])
    np.testing.assert_array_equal(found.loss_mask[~own], batch.loss_mask[~own])
    np.testing.assert_array_equal(found.labelled[~own], batch.loss_mask[~own])


def test_a_row_without_a_counted_token_stays():
    batch = dataclasses.replace(prompts(), loss_mask=np.zeros((6, LENGTH), np.float32))
    found = sampled(batch=batch)
    np.testing.assert_array_equal(found.tokens, batch.tokens)
    assert float(found.loss_mask.sum()) == 0


def test_the_draw_depends_on_the_row_and_the_key_alone():
    batch = prompts(8)
    whole = np.asarray(sampled(batch=batch).tokens)
    half = jax.tree.map(lambda x: x[4:], batch)
    np.testing.assert_array_equal(sampled(batch=half, first_row=4).tokens, whole[4:])
    assert not np.array_equal(sampled(batch=half, first_row=0).tokens, whole[4:])
    assert not np.array_equal(sampled(batch=batch, key=1).tokens, whole)


def test_labels_do_not_count_on_sampled_rows():
    student, teacher = both()
    batch = sampled(params=student)
    sums = make_loss()(STUDENT, student, batch, teacher, step=jnp.int32(0), compute=Compute())
    assert float(sums.means["hard_loss"]) == 0 and float(sums.means["soft_loss"]) > 0
    assert float(sums.weight) == float(batch.loss_mask.sum())


def test_the_steps_agree_on_devices(monkeypatch):
    """By jit on one device and by pmap on four the same rows are said."""
    monkeypatch.setattr(test_distill, "random_batch", lambda rows, seed: prompts(rows, seed))
    prepare = OnPolicy(0.5, 1.0, NUM_IDS)
    section = SECTION.replace(on_policy=0.5)
    alone = Case(section, prepare=prepare).run({"data": 1}, steps=2)[1]
    mapped = Case(section, axis=AXIS, prepare=prepare).run({"data": 4}, pmap=True, steps=2)[1]
    for one, other in zip(mapped, alone, strict=True):
        assert one == pytest.approx(other, rel=5e-5, abs=5e-5)
    assert alone[0]["trained_tokens"] != float(prompts(16).loss_mask.sum()), "some end early"
