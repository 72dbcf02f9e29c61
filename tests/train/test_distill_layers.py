"""Losses of layers: against transformers and by hand, and the weights that stand beside a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax import tree
from llama_jax.formats.checkpoint import load_model
from llama_jax.model import transformer
from llama_jax.weights.select import trainable_mask
from tests.reference import reference_model
from tests.tiny import FAMILIES, tiny_params
from tests.train import test_distill
from tests.train.test_distill import COMPUTE, NUM_IDS, STUDENT, TEACHER, both
from tests.train.test_distill_run import TEACHER as TEACHER_RUN
from tests.train.test_distill_run import TINY, distill, numbers, same_bits, teacher  # noqa: F401
from tests.train.tiny_data import random_batch
from train.build import dry_run
from train.distill import DistillLoss
from train.distill_layers import Side, attention_loss, attention_map, hidden_loss, init_auxiliary
from train.distill_pmap import AXIS
from train.loop import train
from train.optim import make_optimizer, make_schedule
from train.sections.distill import DistillSection
from train.sections.optimizer import OptimizerSection
from train.sections.schedule import ScheduleSection
from train.state import init_state
from train.step import make_train_step

pytestmark = pytest.mark.compiled_quickly

SECTION = DistillSection(
    teacher="t",
    hidden={"weight": 0.5},
    attention={"weight": {"start": 2.0, "end": 0.0}, "layers": ((0, 1),)},
)


def side(config, params, batch):
    _, states, _ = transformer.layer_states(
        config,
        params,
        jnp.asarray(batch.tokens),
        compute=COMPUTE,
        positions=jnp.asarray(batch.positions),
        segment_ids=jnp.asarray(batch.segment_ids),
    )
    return Side(config, params, states)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "llama3-rope"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_states_and_maps_are_those_of_transformers(family):
    config = FAMILIES[family]
    params = tiny_params(config)
    batch = random_batch(2)
    whole = type(batch)(
        **{**vars(batch), "segment_ids": np.ones_like(batch.tokens)}
        | {"positions": np.broadcast_to(np.arange(batch.tokens.shape[1]), batch.tokens.shape)}
    )
    whole = jax.tree.map(jnp.asarray, whole)
    with torch.no_grad():
        theirs = reference_model(config, params)(
            torch.tensor(batch.tokens, dtype=torch.long),
            output_hidden_states=True,
            output_attentions=True,
        )
    ours = side(config, params, whole)
    assert len(ours.states) == config.num_hidden_layers + 1
    # transformers gives the last state behind the norm.
    for mine, other in zip(ours.states[:-1], theirs.hidden_states[:-1], strict=True):
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-4)
    for layer, other in enumerate(theirs.attentions):
        mine = attention_map(ours, layer, whole, compute=COMPUTE)
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-5)


def test_the_sums_by_hand():
    student, taught = both()
    batch = jax.tree.map(jnp.asarray, random_batch(4))
    a, b = side(STUDENT, student, batch), side(TEACHER, taught, batch)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(1, TEACHER.hidden_size, STUDENT.hidden_size)).astype(np.float32)
    found = hidden_loss(jnp.asarray(matrix), ((0, 1),), a, b, batch.loss_mask)
    off = np.asarray(a.states[1]) @ matrix[0].T - np.asarray(b.states[2])
    each = (off**2).sum(-1) / (np.asarray(b.states[2]) ** 2).sum(-1)
    np.testing.assert_allclose(found, (each * batch.loss_mask).sum(), rtol=1e-4)

    logits = rng.normal(size=(1, 4, 4)).astype(np.float32)
    pairs = ((0, 0),)
    found = attention_loss(jnp.asarray(logits), pairs, a, b, batch, compute=COMPUTE)
    p, q = (np.asarray(attention_map(x, 0, batch, compute=COMPUTE), np.float64) for x in (b, a))
    share = np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True)
    mixed = np.einsum("nm,bmts->bnts", share, q)
    each = np.where(p > 0, p * np.log(np.maximum(p, 1e-30) / np.maximum(mixed, 1e-30)), 0)
    expected = (each.sum(-1).mean(1) * batch.loss_mask).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_model_is_no_distance_from_itself():
    params = tiny_params(TEACHER)
    batch = jax.tree.map(jnp.asarray, random_batch(2))
    one = side(TEACHER, params, batch)
    section = SECTION.replace(attention=SECTION.attention.replace(layers=((0, 0),)))
    start = init_auxiliary(section, TEACHER, TEACHER)
    assert start["hidden_projection"].shape == (2, 64, 64)
    pairs = ((0, 0), (1, 1))
    assert float(hidden_loss(start["hidden_projection"], pairs, one, one, batch.loss_mask)) == 0
    sure = 50 * jnp.eye(4)[None]
    found = attention_loss(sure, ((0, 0),), one, one, batch, compute=COMPUTE)
    assert float(found) == pytest.approx(0, abs=1e-4)
    # And at the beginning each head is mostly its own.
    early = attention_loss(start["attention_mixture"], ((0, 0),), one, one, batch, compute=COMPUTE)
    assert 0 < float(early) < 0.1 * batch.loss_mask.sum()


class Case(test_distill.Case):
    def __init__(self, axis=None, config=STUDENT):
        self.student, self.teacher = both()
        self.config = config
        self.mask = trainable_mask(STUDENT, self.student, None, method="full")
        self.auxiliary = init_auxiliary(SECTION, STUDENT, TEACHER)
        schedule = make_schedule(ScheduleSection(name="constant"), peak=1e-2, total_steps=10)
        self.optimizer = make_optimizer(
            STUDENT,
            self.student,
            self.mask,
            OptimizerSection(weight_decay=0.5),
            schedule,
            auxiliary=self.auxiliary,
        )
        self.loss = DistillLoss(SECTION, TEACHER, NUM_IDS, 10)
        self.step = make_train_step(
            STUDENT, COMPUTE, optimizer=self.optimizer, mask=self.mask, loss=self.loss, axis=axis
        )

    def state(self):
        return init_state(
            jax.tree.map(jnp.copy, self.student),
            mask=self.mask,
            optimizer=self.optimizer,
            rng=jax.random.key(0),
            auxiliary=jax.tree.map(jnp.copy, self.auxiliary),
        )


@pytest.fixture(scope="module")
def alone():
    return Case().run({"data": 1})


def test_losses_add_up_and_everything_learns(alone):
    case = Case()
    state, rows = alone
    first = rows[0]
    plain = 0.5 * first["hard_loss"] + 0.5 * first["soft_loss"]
    layers = 0.5 * first["hidden_loss"] + 2.0 * first["attention_loss"]
    assert first["loss"] == pytest.approx(plain + layers, rel=1e-5)
    for name, before in case.auxiliary.items():
        assert (np.asarray(state.auxiliary[name]) != np.asarray(before)).any(), name
    assert set(state.params) == set(case.student)
    # A projection that nothing pulls at stays: its decay is zero.
    batch = random_batch(4)
    gradient = jax.grad(
        lambda student, aux: case.loss(
            STUDENT,
            student,
            batch,
            case.teacher,
            step=jnp.int32(0),
            compute=COMPUTE,
            auxiliary=aux,
        ).means["hidden_loss"],
        argnums=(0, 1),
    )(case.student, case.auxiliary)
    assert float(jnp.abs(gradient[0]["layers"]["mlp"]["up_proj"]["weight"]).max()) > 0
    assert float(jnp.abs(gradient[1]["hidden_projection"]).max()) > 0
    assert (np.asarray(gradient[1]["attention_mixture"]) == 0).all()


def test_every_mesh_and_pmap_give_the_same(alone):
    for axis, sizes in ((None, {"data": 2, "fsdp": 2, "tensor": 2}), (AXIS, {"data": 8})):
        state, rows = Case(axis).run(sizes, pmap=axis is not None)
        for one, other in zip(rows, alone[1], strict=True):
            assert one == pytest.approx(other, rel=5e-5, abs=5e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
            state.auxiliary,
            alone[0].auxiliary,
        )


LAYERS = {"hidden": {"weight": 1.0}, "attention": {"weight": 0.5, "layers": [[0, 2], [1, 1]]}}


def test_a_stopped_run_goes_on_with_its_projections(tmp_path, teacher):  # noqa: F811
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = train(distill(tmp_path / "whole", teacher, distill=LAYERS, optimizer__name="muon"))
    again = distill(tmp_path / "stopped", teacher, distill=LAYERS, optimizer__name="muon")
    train(again, stop_after=3)
    result = train(again)
    assert numbers(result) == numbers(whole)
    same_bits(result.params, whole.params)
    _, params = load_model(sorted((result.run_dir / "checkpoints").glob("step_*"))[-1])
    assert "auxiliary" not in params
    assert tree.flatten(params).keys() == tree.flatten(whole.params).keys()


def test_what_does_not_fit_is_refused(tmp_path, teacher):  # noqa: F811
    def refused(message, section, **changes):
        with pytest.raises(ValueError, match=message):
            train(distill(tmp_path, teacher, distill=section, **changes))

    pair = {"weight": 1.0, "layers": [[0, 3]]}
    refused("the teacher has 3 layers, counted from 0", {"hidden": pair})
    pair = {"weight": 1.0, "layers": [[9, 0]]}
    refused("distill.attention.layers pairs .*the student has", {"attention": pair})
    refused("must be at least 0", {"hidden": {"weight": -1.0}})
    refused("hidden.weight.end is -1", {"hidden": {"weight": {"start": 0, "end": -1}}})
    refused("layers is empty", {"hidden": {"weight": 1.0, "layers": []}})
    refused("student twice", {"hidden": {"weight": 1.0, "layers": [[0, 0], [0, 1]]}})
    refused("counted from 0", {"hidden": {"weight": 1.0, "layers": [[-1, 0]]}})
    refused("list of 2 values", {"hidden": {"weight": 1.0, "layers": [[1]]}})
    refused("keeps its outputs alone", {"hidden": {"weight": 1.0}, "top_k": 4})
    mesh = {"cpu_devices": 2, "context": 2}
    refused("mesh.context is 2", {"attention": {"weight": 1.0}}, mesh=mesh)


def test_they_are_counted_with_the_state(tmp_path, teacher):  # noqa: F811
    """A value and two moments of each, in float32."""
    sizes = [
        dry_run(distill(tmp_path, teacher, distill=layers))["state_bytes"]
        for layers in (LAYERS, {})
    ]
    layers, ours = TINY["num_hidden_layers"], TINY["hidden_size"]
    values = layers * 48 * ours + 2 * (
        TEACHER_RUN.num_attention_heads * TINY["num_attention_heads"]
    )
    assert sizes[0] - sizes[1] == 12 * values
