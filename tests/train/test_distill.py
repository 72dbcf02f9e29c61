"""The distillation loss and its two steps: exact sums, every mesh, pmap and jit alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.mesh.sharding import batch_sharding, make_mesh, shardings
from llama_jax.model.divergence import divergences
from llama_jax.model.losses import next_token_loss
from llama_jax.model.transformer import forward
from llama_jax.weights.quantize import quantize
from llama_jax.weights.select import trainable_mask
from tests.tiny import FAMILIES, tiny_config, tiny_params
from tests.train.tiny_data import random_batch
from train.distill import DistillLoss, ramp
from train.distill_pmap import AXIS, make_pmap_step
from train.optim import make_optimizer, make_schedule
from train.sections.distill import DistillSection, RampSection
from train.sections.optimizer import OptimizerSection
from train.sections.schedule import ScheduleSection
from train.state import init_state, state_shardings
from train.step import make_eval_step, make_train_step

pytestmark = pytest.mark.compiled_quickly

STUDENT = FAMILIES["llama-tied"].replace(hidden_size=32, num_hidden_layers=1)
TEACHER = FAMILIES["llama-gqa"].replace(vocab_size=136)  # padded further than the student
NUM_IDS = 125
COMPUTE = Compute(loss_chunk_tokens=16)  # several chunks
SECTION = DistillSection(teacher="t", temperature=2.0, soft_weight=0.7)


def make_loss(section=SECTION, teacher=TEACHER, steps=10):
    return DistillLoss(section, teacher, NUM_IDS, steps)


def logits_of(config, params, batch):
    return forward(
        config,
        params,
        jnp.asarray(batch.tokens),
        positions=jnp.asarray(batch.positions),
        segment_ids=jnp.asarray(batch.segment_ids),
    )


def expected(section, student, teacher, batch, temperature=2.0, soft_weight=0.7):
    """(loss, hard, soft) from the logits of the whole batch."""
    logits = logits_of(STUDENT, student, batch)
    taught = logits_of(TEACHER, teacher, batch)
    hard = next_token_loss(STUDENT, student, batch, compute=Compute())[0]
    each = divergences(
        logits[..., :NUM_IDS],
        taught[..., :NUM_IDS],
        kind=section.divergence,
        temperature=temperature,
    )
    soft = (each * batch.loss_mask).sum()
    return (1 - soft_weight) * hard + soft_weight * soft, hard, soft


def both(seed=0):
    return tiny_params(STUDENT, seed), tiny_params(TEACHER, seed + 1)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_the_chunked_loss_and_its_gradient_are_those_of_whole_logits(kind):
    section = SECTION.replace(divergence=kind)
    student, teacher = both()
    batch = random_batch(4)

    def found(student):
        sums = make_loss(section)(
            STUDENT, student, batch, teacher, step=jnp.int32(0), compute=COMPUTE
        )
        return sums.loss, sums

    (loss, sums), gradient = jax.value_and_grad(found, has_aux=True)(student)
    plain, exact = jax.value_and_grad(lambda s: expected(section, s, teacher, batch)[0])(student)
    _, hard, soft = expected(section, student, teacher, batch)
    np.testing.assert_allclose(loss, plain, rtol=1e-5)
    np.testing.assert_allclose(sums.means["hard_loss"], hard, rtol=1e-5)
    np.testing.assert_allclose(sums.means["soft_loss"], soft, rtol=1e-5)
    assert float(sums.weight) == batch.loss_mask.sum()
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(exact))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * largest), gradient, exact
    )


def padded(lengths, width, seed=0):
    """Rows of the given lengths; what follows them is padding that counts nothing."""
    batch = random_batch(len(lengths), width, seed=seed, counted=1.1)
    inside = np.arange(width) < np.asarray(lengths)[:, None]
    tokens = random_batch(len(lengths), max(lengths), seed=seed)
    fixed = np.zeros((len(lengths), width), np.int32)
    fixed[:, : max(lengths)] = tokens.tokens
    targets = np.zeros_like(fixed)
    targets[:, : max(lengths)] = tokens.targets
    return dataclasses.replace(
        batch,
        tokens=np.where(inside, fixed, 0),
        targets=np.where(inside, targets, 0),
        loss_mask=inside.astype(np.float32),
        segment_ids=inside.astype(np.int32),
    )


def test_padding_changes_nothing_and_counts_nothing():
    """R69."""
    student, teacher = both()
    found = []
    for width in (5, 10):
        batch = padded((2, 5), width)
        loss, gradient = jax.value_and_grad(
            lambda s, b=batch: (
                make_loss()(STUDENT, s, b, teacher, step=jnp.int32(0), compute=COMPUTE).loss
            )
        )(student)
        sums = make_loss()(STUDENT, student, batch, teacher, step=jnp.int32(0), compute=COMPUTE)
        assert float(sums.weight) == 7
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
        found.append((float(loss), gradient))
    mean = expected(SECTION, student, teacher, padded((2, 5), 5))[0] / 7
    assert found[0][0] / 7 == pytest.approx(float(mean), rel=1e-5)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found[0][1], found[1][1])


def test_a_teacher_that_is_not_finite_at_padding_does_no_harm():
    """R69: its head is made infinite, so that only masked positions are finite."""
    student, teacher = both()
    batch = padded((2, 5), 5)
    empty = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    broken = tree.map_with_path(
        lambda path, leaf: -jnp.inf * jnp.ones_like(leaf) if "lm_head" in path else leaf, teacher
    )
    loss, gradient = jax.value_and_grad(
        lambda s: make_loss()(STUDENT, s, empty, broken, step=jnp.int32(0), compute=COMPUTE).loss
    )(student)
    assert float(loss) == 0
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(gradient))


def test_a_student_equal_to_its_teacher_is_at_distance_0_and_the_loss_has_no_chance_in_it():
    """R70."""
    params, batch = tiny_params(TEACHER), random_batch(4)
    loss = make_loss()

    def sums(_):
        return loss(
            TEACHER, params, batch, params, step=jnp.int32(0), compute=COMPUTE, measure=True
        )

    one, two = sums(0), sums(1)
    assert float(one.loss) == float(two.loss)
    assert float(one.means["soft_loss"]) == pytest.approx(0, abs=1e-4)
    assert float(one.means["kl"]) == pytest.approx(0, abs=1e-4)
    assert float(one.means["agreement"]) == float(one.weight)


def test_numbers_follow_their_schedules():
    falling = RampSection(start=4.0, end=1.0, steps=3)
    assert [float(ramp(falling, i, 10)) for i in range(5)] == [4.0, 3.0, 2.0, 1.0, 1.0]
    whole_run = RampSection(start=0.0, end=1.0)
    assert [float(ramp(whole_run, i, 4)) for i in (0, 2, 4)] == [0.0, 0.5, 1.0]
    assert float(ramp(0.3, 7, 10)) == pytest.approx(0.3)
    section = SECTION.replace(temperature=falling, soft_weight=RampSection(start=1, end=0, steps=2))
    student, teacher = both()
    batch = random_batch(2)
    for step, temperature, weight in ((0, 4.0, 1.0), (1, 3.0, 0.5), (2, 2.0, 0.0)):
        sums = make_loss(section)(
            STUDENT, student, batch, teacher, step=jnp.int32(step), compute=COMPUTE
        )
        plain = expected(section, student, teacher, batch, temperature, weight)[0]
        np.testing.assert_allclose(sums.loss, plain, rtol=1e-5)


class Case:
    """A step of distillation on all weights of the student."""

    def __init__(self, section=SECTION, axis=None, teacher=None, **options):
        self.student, self.teacher = both()
        self.teacher = teacher or self.teacher
        self.mask = trainable_mask(STUDENT, self.student, None, method="full")
        schedule = make_schedule(ScheduleSection(name="constant"), peak=1e-2, total_steps=10)
        # With a small epsilon AdamW moves weights of all but zero gradient by the noise in it.
        adamw = OptimizerSection(epsilon=1e-4)
        self.optimizer = make_optimizer(STUDENT, self.student, self.mask, adamw, schedule)
        self.step = make_train_step(
            STUDENT,
            COMPUTE,
            optimizer=self.optimizer,
            mask=self.mask,
            loss=make_loss(section),
            axis=axis,
            **options,
        )

    def state(self):
        params = jax.tree.map(jnp.copy, self.student)
        rng = jax.random.key(0)
        return init_state(params, mask=self.mask, optimizer=self.optimizer, rng=rng)

    def run(self, sizes, pmap=False, steps=3):
        """(parameters, metrics of each step) on a mesh."""
        count = int(np.prod(list(sizes.values())))
        mesh = make_mesh(sizes, devices=jax.devices()[:count])
        places = state_shardings(STUDENT, jax.eval_shape(self.state), mesh, COMPUTE.rules)
        beside = shardings(TEACHER, self.teacher, mesh, COMPUTE.rules)
        place = batch_sharding(mesh)
        if pmap:
            step = make_pmap_step(self.step, STUDENT, mesh, num_beside=1)
        else:
            step = jax.jit(
                self.step, in_shardings=(places, place, beside), out_shardings=(places, None)
            )
        with jax.set_mesh(mesh):
            state = jax.device_put(self.state(), places)
            teacher = jax.device_put(self.teacher, beside)
            rows = []
            for seed in range(steps):
                batch = jax.device_put(random_batch(16, seed=seed), place)
                state, metrics = step(state, batch, teacher)
                rows.append({name: float(value) for name, value in metrics.items()})
        return state, rows


@pytest.fixture(scope="module")
def alone():
    return Case().run({"data": 1})


@pytest.mark.parametrize(("sizes", "parts"), [({"data": 2, "fsdp": 2, "tensor": 2}, 2)])
def test_meshes_and_micro_batches_give_the_single_device_result(alone, sizes, parts):
    state, found = Case(accumulation_steps=parts).run(sizes)
    for one, other in zip(found, alone[1], strict=True):
        assert one == pytest.approx(other, rel=5e-5, abs=5e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, alone[0].params
    )


def test_the_optimizer_knows_nothing_of_the_teacher():
    """R70: no state, and a quantized teacher serves as well."""
    case = Case(teacher=quantize(TEACHER, both()[1], scheme="int8"))
    before = jax.tree.map(np.asarray, case.teacher)
    sizes = {array.size for array in jax.tree.leaves(case.state().opt_state)}
    assert sizes <= {array.size for array in jax.tree.leaves(case.student)} | {1}
    step, state = jax.jit(case.step, donate_argnums=0), case.state()
    losses = []
    for _ in range(6):
        state, metrics = step(state, random_batch(8), case.teacher)
        losses.append(float(metrics["soft_loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, case.teacher))


def test_an_evaluation_measures_the_divergence_at_temperature_1():
    student, teacher = both()
    batch = random_batch(4)
    sums = make_eval_step(STUDENT, COMPUTE, loss=make_loss())(student, batch, jnp.int32(3), teacher)
    logits, taught = logits_of(STUDENT, student, batch), logits_of(TEACHER, teacher, batch)
    logits, taught = logits[..., :NUM_IDS], taught[..., :NUM_IDS]
    kl = divergences(logits, taught, kind="forward_kl")
    np.testing.assert_allclose(sums["kl"], (kl * batch.loss_mask).sum(), rtol=1e-5)
    same = (logits.argmax(-1) == taught.argmax(-1)).astype(jnp.float32)
    assert float(sums["agreement"]) == (same * batch.loss_mask).sum()


def test_pmap_refuses_experts():
    with pytest.raises(ValueError, match="the student has experts"):
        make_pmap_step(
            Case(axis=AXIS).step, FAMILIES["mixtral"], make_mesh({"data": 8}), num_beside=1
        )


def test_the_head_of_a_student_with_its_own_vocabulary_size_is_trained_whole():
    """A student whose vocabulary is padded further than the teacher's."""
    wide = tiny_config(vocab_size=160)
    student, teacher = tiny_params(wide), tiny_params(TEACHER, 1)
    batch = random_batch(4)
    found = make_loss()(wide, student, batch, teacher, step=jnp.int32(0), compute=COMPUTE)
    logits, taught = logits_of(wide, student, batch), logits_of(TEACHER, teacher, batch)
    soft = divergences(
        logits[..., :NUM_IDS], taught[..., :NUM_IDS], kind="forward_kl", temperature=2.0
    )
    np.testing.assert_allclose(found.means["soft_loss"], (soft * batch.loss_mask).sum(), rtol=1e-5)
