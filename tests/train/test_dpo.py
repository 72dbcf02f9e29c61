"""DPO: the published losses, exact gradients, and the same numbers on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.mesh.sharding import batch_sharding, make_mesh
from llama_jax.model.log_probs import sequence_log_probs
from llama_jax.model.losses import next_token_loss
from llama_jax.model.transformer import forward
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.select import trainable_mask
from tests.tiny import FAMILIES, tiny_params
from tests.train.tiny_data import random_batch
from train.data.preference import with_reference
from train.dpo import make_dpo_loss, pair_losses
from train.optim import make_optimizer, make_schedule
from train.sections.dpo import DpoSection
from train.sections.optimizer import OptimizerSection
from train.sections.schedule import ScheduleSection
from train.state import init_state, state_shardings
from train.step import make_train_step

pytestmark = pytest.mark.compiled_quickly

CONFIG = FAMILIES["llama-gqa"]
COMPUTE = Compute(loss_chunk_tokens=16)  # several chunks
CACHED = DpoSection(reference="cached")
OFF = DpoSection(reference="adapter_off")


def adapted(seed: int = 1) -> dict:
    """Parameters whose adapters do something, also on the head."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"])
    params = add_lora(CONFIG, tiny_params(CONFIG), lora, jax.random.key(seed))

    def moved(path, leaf):
        if not hasattr(leaf, "lora_b"):
            return leaf
        key = jax.random.fold_in(jax.random.key(seed), len(path))
        lora_b = 0.3 * jax.random.normal(key, leaf.lora_b.shape)
        return dataclasses.replace(leaf, lora_b=lora_b)

    return tree.map_with_path(moved, params)


def torch_log_probs(params, batch) -> torch.Tensor:
    """Sequence log-probabilities from the logits of the whole batch."""
    logits = forward(
        CONFIG,
        params,
        jnp.asarray(batch.tokens),
        positions=jnp.asarray(batch.positions),
        segment_ids=jnp.asarray(batch.segment_ids),
    )
    logps = torch.log_softmax(torch.tensor(np.asarray(logits, np.float64)), dim=-1)
    targets = torch.tensor(np.asarray(batch.targets, np.int64))
    found = logps.gather(-1, targets[..., None])[..., 0]
    return (found * torch.tensor(np.asarray(batch.loss_mask, np.float64))).sum(-1)


def published(section, policy: torch.Tensor, reference: torch.Tensor, lengths) -> torch.Tensor:
    """The losses of the papers, pair by pair."""
    beta, eps = section.beta, section.label_smoothing
    if section.loss == "ipo":
        policy, reference = policy / lengths, reference / lengths
    pi_logratios = policy[0::2] - policy[1::2]
    ref_logratios = reference[0::2] - reference[1::2]
    h = pi_logratios - ref_logratios
    log_sigmoid = torch.nn.functional.logsigmoid
    return {
        "sigmoid": -log_sigmoid(beta * h) * (1 - eps) - log_sigmoid(-beta * h) * eps,
        "hinge": torch.relu(1 - beta * h),
        "ipo": (h - 1 / (2 * beta)) ** 2,
    }[section.loss]


SECTIONS = [
    OFF,
    OFF.replace(beta=0.5, label_smoothing=0.2),
    OFF.replace(loss="ipo", beta=0.3),
    OFF.replace(loss="hinge", beta=0.05),
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: f"{s.loss}-{s.label_smoothing}")
def test_losses_and_rewards_equal_the_published_ones(section):
    params, batch = adapted(), random_batch(8)
    policy = torch_log_probs(params, batch)
    reference = torch_log_probs(tiny_params(CONFIG), batch)
    lengths = torch.tensor(batch.loss_mask.sum(-1))
    expected = published(section, policy, reference, lengths)
    sums = make_dpo_loss(section)(CONFIG, params, batch, compute=COMPUTE)
    assert float(sums.weight) == 4
    np.testing.assert_allclose(float(sums.loss), expected.sum(), rtol=1e-5)
    scale = lengths if section.loss == "ipo" else 1.0
    rewards = section.beta * (policy - reference) / scale
    chosen, rejected = rewards[0::2], rewards[1::2]
    means = {name: float(value) for name, value in sums.means.items()}
    assert means == pytest.approx(
        {
            "reward_chosen": float(chosen.sum()),
            "reward_rejected": float(rejected.sum()),
            "reward_margin": float((chosen - rejected).sum()),
            "reward_accuracy": float((chosen > rejected).sum()),
        },
        rel=1e-4,
        abs=1e-4,
    )


def test_without_a_difference_the_loss_is_log_2():
    """Fresh adapters change nothing: h is 0 for every pair."""
    params = add_lora(CONFIG, tiny_params(CONFIG), LoraConfig(r=4), jax.random.key(1))
    sums = make_dpo_loss(OFF)(CONFIG, params, random_batch(8), compute=COMPUTE)
    assert float(sums.loss) == pytest.approx(4 * np.log(2), rel=1e-6)
    assert float(sums.means["reward_margin"]) == 0.0


def test_losses_of_given_differences():
    h = jnp.asarray([-3.0, 0.0, 2.0])
    sigmoid = pair_losses(DpoSection(beta=0.5), h)
    np.testing.assert_allclose(sigmoid, np.log1p(np.exp(-0.5 * np.asarray(h))), rtol=1e-6)
    assert pair_losses(DpoSection(loss="hinge", beta=0.5), h).tolist() == [2.5, 1.0, 0.0]
    assert pair_losses(DpoSection(loss="ipo", beta=0.5), h).tolist() == [16.0, 1.0, 1.0]


def test_extreme_differences_stay_finite():
    h = jnp.asarray([-1e4, 1e4])
    for section in (DpoSection(), DpoSection(label_smoothing=0.1), DpoSection(loss="hinge")):
        gradient = jax.grad(lambda h, s=section: pair_losses(s, h).sum())(h)
        assert np.isfinite(pair_losses(section, h)).all() and np.isfinite(gradient).all()


def test_a_sequence_has_the_log_probability_of_its_tokens():
    """Chunks, padding and other rows change nothing; the sum is that of the cross entropy."""
    params, batch = adapted(), random_batch(6, counted=0.7)
    found, _ = sequence_log_probs(CONFIG, params, batch, compute=COMPUTE)
    np.testing.assert_allclose(found, torch_log_probs(params, batch), rtol=1e-5)
    one_chunk, _ = sequence_log_probs(CONFIG, params, batch, compute=Compute())
    np.testing.assert_allclose(found, one_chunk, rtol=1e-5)
    total, _, _ = next_token_loss(CONFIG, params, batch, compute=Compute())
    np.testing.assert_allclose(-found.sum(), total, rtol=1e-5)


@pytest.mark.parametrize("section", [OFF, CACHED.replace(loss="ipo")], ids=lambda s: s.loss)
def test_gradients_equal_the_chain_rule_through_the_cross_entropy(section):
    """d loss = sum over rows of (d loss / d log p) * d log p, each taken by itself."""
    params, batch = adapted(), random_batch(4)
    if section.reference == "cached":
        batch = with_reference(batch, np.asarray([-20.0, -25.0, -30.0, -22.0], np.float32))
    mask = trainable_mask(CONFIG, params, None, method="lora")
    trained, frozen = tree.partition(params, mask)
    loss = make_dpo_loss(section)

    def total(trained):
        return loss(CONFIG, tree.combine(trained, frozen), batch, compute=COMPUTE).loss

    found = jax.grad(total)(trained)
    policy = torch_log_probs(params, batch).requires_grad_()
    reference = (
        torch_log_probs(tiny_params(CONFIG), batch)
        if section.reference == "adapter_off"
        else torch.tensor(batch.reference.sum(-1), dtype=torch.float64)
    )
    lengths = torch.tensor(batch.loss_mask.sum(-1))
    published(section, policy, reference, lengths).sum().backward()
    weights = policy.grad.numpy()

    def surrogate(trained):
        weighed = dataclasses.replace(batch, loss_mask=batch.loss_mask * -weights[:, None])
        params = tree.combine(trained, frozen)
        return next_token_loss(CONFIG, params, weighed, compute=Compute())[0]

    expected = jax.grad(surrogate)(trained)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert largest > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * largest), found, expected
    )


def test_padding_rows_are_no_pair():
    params, batch = adapted(), random_batch(8)
    whole = make_dpo_loss(OFF)(CONFIG, params, batch, compute=COMPUTE)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    found = make_dpo_loss(OFF)(CONFIG, params, padded, compute=COMPUTE)
    assert float(found.weight) == 4
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-6)
    for name, value in whole.means.items():
        np.testing.assert_allclose(found.means[name], value, rtol=1e-5, atol=1e-6)


class Case:
    """A step of DPO, with adapters or on all weights."""

    def __init__(self, section, **options):
        self.params = adapted() if section.reference == "adapter_off" else tiny_params(CONFIG)
        method = "lora" if section.reference == "adapter_off" else "full"
        self.mask = trainable_mask(CONFIG, self.params, None, method=method)
        schedule = make_schedule(ScheduleSection(name="constant"), peak=1e-2, total_steps=10)
        self.optimizer = make_optimizer(
            CONFIG, self.params, self.mask, OptimizerSection(name="sgd"), schedule
        )
        self.step = make_train_step(
            CONFIG,
            COMPUTE,
            optimizer=self.optimizer,
            mask=self.mask,
            loss=make_dpo_loss(section),
            rows_per_item=2,
            **options,
        )

    def state(self):
        rng = jax.random.key(0)
        return init_state(self.params, mask=self.mask, optimizer=self.optimizer, rng=rng)


def batch_for(section, rows: int = 16, seed: int = 0):
    batch = random_batch(rows, seed=seed)
    if section.reference == "cached":
        values = -np.random.default_rng(seed).uniform(10, 40, rows).astype(np.float32)
        return with_reference(batch, values)
    return batch


def outcome(case: Case, section, sizes: dict[str, int]):
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, devices=jax.devices()[:count])
    places = state_shardings(CONFIG, jax.eval_shape(case.state), mesh, COMPUTE.rules)
    place = batch_sharding(mesh)
    step = jax.jit(case.step, in_shardings=(places, place), out_shardings=(places, None))
    with jax.set_mesh(mesh):
        state = jax.device_put(jax.tree.map(jnp.copy, case.state()), places)
        rows = []
        for seed in range(2):
            state, metrics = step(state, jax.device_put(batch_for(section, seed=seed), place))
            rows.append({name: float(value) for name, value in metrics.items()})
    return state.params, rows


@pytest.mark.parametrize(
    ("section", "others"),
    [
        (OFF, [({"data": 8}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 4)]),
        (CACHED, [({"fsdp": 4, "tensor": 2}, 2)]),
    ],
    ids=["lora", "full"],
)
def test_meshes_and_micro_batches_give_the_single_device_result(section, others):
    expected, metrics = outcome(Case(section), section, {"data": 1})
    assert {"reward_accuracy", "reward_margin", "loss"} <= metrics[0].keys()
    assert metrics[0]["trained_tokens"] == batch_for(section).loss_mask.sum()
    for sizes, parts in others:
        params, found = outcome(Case(section, accumulation_steps=parts), section, sizes)
        for one, other in zip(found, metrics, strict=True):
            assert one == pytest.approx(other, rel=2e-5, abs=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, expected)


def test_training_prefers_the_chosen_answers():
    case = Case(CACHED)
    step, state, seen = jax.jit(case.step), case.state(), []
    start, _ = sequence_log_probs(CONFIG, case.params, random_batch(8), compute=COMPUTE)
    batch = with_reference(random_batch(8), np.asarray(start))
    for _ in range(8):
        state, metrics = step(state, batch)
        seen.append({name: float(value) for name, value in metrics.items()})
    assert seen[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert seen[-1]["loss"] < seen[0]["loss"] and seen[-1]["reward_accuracy"] == 1.0
    assert seen[-1]["reward_margin"] > 0
