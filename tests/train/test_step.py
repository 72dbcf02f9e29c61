"""The step: token means, accumulation, skipped updates, frozen bits, and any mesh the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.mesh.sharding import batch_sharding, make_mesh
from llama_jax.model.losses import Batch, next_token_loss
from llama_jax.model.moe import balancing_loss
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.select import trainable_mask
from llama_jax.weights.table import weight_table
from tests.tiny import FAMILIES, tiny_params
from tests.train.tiny_data import random_batch
from train.distill_pmap import AXIS, make_pmap_step
from train.optim import make_optimizer, make_schedule
from train.sections.optimizer import OptimizerSection
from train.sections.schedule import ScheduleSection
from train.state import init_state, state_shardings
from train.step import make_eval_step, make_train_step

pytestmark = pytest.mark.compiled_quickly

# Every expert on every token: its gradient compiles faster than that of the grouped product.
COMPUTE = Compute(loss_chunk_tokens=64, moe="dense")


class Case:
    """A tiny model, its optimizer, and steps over it."""

    def __init__(self, family="llama-gqa", *, lora=False, section=None, compute=COMPUTE, **options):
        self.config = FAMILIES[family]
        if "aux" in options:
            moe = dataclasses.replace(self.config.moe, router_aux_loss_coef=options.pop("aux"))
            self.config = self.config.replace(moe=moe)
        self.params = tiny_params(self.config)
        if lora:
            self.params = add_lora(self.config, self.params, LoraConfig(r=4), jax.random.key(1))
        self.mask = trainable_mask(
            self.config, self.params, None, method="lora" if lora else "full"
        )
        schedule = make_schedule(ScheduleSection(name="constant"), peak=1e-2, total_steps=10)
        section = section or OptimizerSection(name="sgd", max_grad_norm=None)
        self.optimizer = make_optimizer(self.config, self.params, self.mask, section, schedule)
        self.step = make_train_step(
            self.config, compute, optimizer=self.optimizer, mask=self.mask, **options
        )

    def state(self):
        rng = jax.random.key(0)
        return init_state(self.params, mask=self.mask, optimizer=self.optimizer, rng=rng)


def fixed_losses(config, params, batch, *, compute):
    """Token losses that stand in the batch, times a trained number that is 1."""
    del config, compute
    weight = params["norm"]["weight"].mean()
    mask = batch.loss_mask
    return weight * (batch.targets.astype(jnp.float32) * mask).sum(), mask.sum(), None


def losses_batch(losses: list[list[float]], mask: list[list[int]]) -> Batch:
    targets = jnp.asarray(losses, jnp.int32)
    ones = jnp.ones_like(targets)
    return Batch(ones, targets, jnp.asarray(mask, jnp.float32), ones, ones)


@pytest.mark.parametrize("parts", [1, 2])
def test_r40_micro_batches_are_weighed_by_their_tokens(parts):
    """One token of loss 4 and three of loss 1: 7 / 4, not (4 + 1) / 2."""
    case = Case(loss=fixed_losses, accumulation_steps=parts)
    batch = losses_batch([[4, 9, 9], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]])
    params = tree.map_with_path(
        lambda path, x: jnp.ones_like(x) if path == "norm.weight" else x, case.params
    )
    _, metrics = jax.jit(case.step)(dataclasses.replace(case.state(), params=params), batch)
    assert float(metrics["loss"]) == 1.75
    assert float(metrics["trained_tokens"]) == 4


@pytest.mark.parametrize("lora", [False, True])
def test_r40_accumulated_gradients_equal_those_of_the_whole_batch(lora):
    batch = random_batch(8, counted=0.3)
    outcomes = []
    for parts in (1, 2, 8):
        case = Case(lora=lora, accumulation_steps=parts)
        state, metrics = jax.jit(case.step)(case.state(), batch)
        outcomes.append((state.params, float(metrics["loss"]), float(metrics["grad_norm"])))
    for params, loss, norm in outcomes[1:]:
        assert abs(loss - outcomes[0][1]) < 1e-5
        assert abs(norm - outcomes[0][2]) < 1e-5
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, outcomes[0][0]
        )


def test_the_loss_is_the_token_mean_of_the_cross_entropy():
    case, batch = Case(), random_batch()
    total, weight, _ = next_token_loss(case.config, case.params, batch, compute=COMPUTE)
    _, metrics = jax.jit(case.step)(case.state(), batch)
    np.testing.assert_allclose(metrics["loss"], total / weight, rtol=1e-6)
    sums = make_eval_step(case.config, COMPUTE)(case.params, batch)
    np.testing.assert_allclose(sums["loss"] / sums["trained_tokens"], metrics["loss"], rtol=1e-6)
    assert int(metrics["tokens"]) == batch.tokens.size


def test_the_balancing_loss_is_added_with_its_coefficient():
    batch = random_batch()
    steps = {}
    for aux in (0.0, 0.5):
        case = Case("mixtral", aux=aux)
        state, metrics = jax.jit(case.step)(case.state(), batch)
        steps[aux] = state.params
        _, _, stats = next_token_loss(case.config, case.params, batch, compute=COMPUTE)
        np.testing.assert_allclose(metrics["aux_loss"], balancing_loss(stats), rtol=1e-5)
    gate = "layers.block_sparse_moe.gate.weight"

    def auxiliary(params):
        stats = next_token_loss(case.config, params, batch, compute=COMPUTE)[2]
        return balancing_loss(stats)

    gradient = tree.flatten(jax.grad(auxiliary)(case.params))[gate]
    moved = tree.flatten(steps[0.0])[gate] - tree.flatten(steps[0.5])[gate]
    np.testing.assert_allclose(moved, 1e-2 * 0.5 * gradient, atol=1e-6)


def same_bits(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("parts", [1, 2])
def test_r41_a_batch_without_trained_tokens_changes_nothing(parts):
    case = Case(section=OptimizerSection(weight_decay=0.1), accumulation_steps=parts)
    step = jax.jit(case.step)
    state, _ = step(case.state(), random_batch())
    after, metrics = step(state, random_batch(counted=0.0))
    same_bits(after.params, state.params)
    same_bits(after.opt_state, state.opt_state)
    assert int(after.opt_state.count) == 1 and int(after.step) == 2
    assert np.isnan(metrics["loss"]), "no number that could be averaged in"
    assert int(metrics["updated"]) == 0 and float(metrics["grad_norm"]) == 0.0


def test_an_update_that_is_not_finite_is_left_out():
    def explode(config, params, batch, *, compute):
        total, weight, stats = next_token_loss(config, params, batch, compute=compute)
        return jnp.where(batch.tokens[0, 0] == 0, jnp.inf, 1.0) * total, weight, stats

    case = Case(section=OptimizerSection(), loss=explode)
    bad = random_batch()
    bad.tokens[0, 0] = 0
    state, metrics = jax.jit(case.step)(case.state(), bad)
    same_bits(state.params, case.params)
    assert int(metrics["updated"]) == 0 and int(state.opt_state.count) == 0
    assert not np.isfinite(metrics["loss"])


def test_r47_r50_frozen_arrays_keep_their_bits_and_adapters_learn():
    case = Case(lora=True, section=OptimizerSection(weight_decay=0.1))
    step, state, losses = jax.jit(case.step), case.state(), []
    for _ in range(10):
        state, metrics = step(state, random_batch())
        losses.append(float(metrics["loss"]))
    trained, frozen = tree.partition(case.params, case.mask)
    after_trained, after_frozen = tree.partition(state.params, case.mask)
    same_bits(after_frozen, frozen)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after_trained, trained)
    assert min(jax.tree.leaves(moved)) > 0
    assert losses[-1] < losses[0]


def test_r49_no_gradient_of_the_base_exists():
    case = Case(lora=True)
    jaxpr = str(jax.make_jaxpr(case.step)(case.state(), random_batch()))
    # The update of a matrix of the base would add up its outer products over tokens.
    full = Case()
    shape = "f32[2,96,64]"  # gradients of gate_proj and up_proj, stacked over layers
    count = str(jax.make_jaxpr(full.step)(full.state(), random_batch())).count(shape)
    assert jaxpr.count(shape) < count


MESHES = [
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


def run_on(case: Case, sizes: dict[str, int], steps: int = 2):
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, devices=jax.devices()[:count])
    abstract = jax.eval_shape(case.state)
    places = state_shardings(case.config, abstract, mesh, COMPUTE.rules)
    step = jax.jit(
        case.step,
        donate_argnums=0,
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, None),
    )
    with jax.set_mesh(mesh):
        state = jax.device_put(jax.tree.map(jnp.copy, case.state()), places)
        losses = []
        for seed in range(steps):
            state, metrics = step(
                state, jax.device_put(random_batch(16, seed=seed), batch_sharding(mesh))
            )
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return state, np.asarray(losses)


@pytest.fixture(scope="module")
def single():
    case = Case(lora=True)
    return case, *run_on(case, {"data": 1})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_any_mesh_gives_the_single_device_result(sizes, single):
    case, expected, losses = single
    state, found = run_on(case, sizes)
    np.testing.assert_allclose(found, losses, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, expected.params
    )


def test_experts_on_a_mesh_with_accumulation_give_the_single_device_result():
    case = Case("mixtral", aux=0.0, accumulation_steps=2)
    expected, losses = run_on(case, {"data": 1}, steps=1)
    state, found = run_on(case, {"data": 2, "tensor": 2, "expert": 2}, steps=1)
    np.testing.assert_allclose(found, losses, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, expected.params
    )


def test_moments_lie_where_their_parameters_do():
    case = Case(lora=True, section=OptimizerSection())
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    places = state_shardings(case.config, jax.eval_shape(case.state), mesh, COMPUTE.rules)
    params, moments = tree.flatten_arrays(places.params), tree.flatten_arrays(places.opt_state)
    path = "layers.self_attn.q_proj.weight.lora_a"
    assert moments[f"inner.0.mu.{path}"] == params[path]
    assert params[path].spec == jax.sharding.PartitionSpec(
        None, None, ("fsdp", "context", "expert")
    )
    assert moments["count"].spec == jax.sharding.PartitionSpec()


@pytest.mark.parametrize(
    ("family", "sizes", "parts"),
    [("llama-gqa", {"fsdp": 4, "tensor": 2}, 1), ("mixtral", {"data": 1}, 2)],
)
def test_gradients_kept_in_bfloat16_are_the_others_rounded(family, sizes, parts):
    """Matrices of layers move as far, up to the rounding of partial sums, and the head up to one
    rounding of the whole; all else moves the same."""
    moved = {}
    for dtype in ("float32", "bfloat16"):
        compute = dataclasses.replace(COMPUTE, dtype="bfloat16", gradient_dtype=dtype)
        case = Case(family, compute=compute, accumulation_steps=parts)
        state, _ = run_on(case, sizes, steps=1)
        change = jax.tree.map(
            lambda after, before: np.asarray(after) - np.asarray(before), state.params, case.params
        )
        moved[dtype] = tree.flatten_arrays(change)
    table = weight_table(FAMILIES[family])
    for path, wanted in moved["float32"].items():
        found, scale = moved["bfloat16"][path], np.abs(wanted).max()
        assert found.dtype == np.float32
        assert scale > 0
        close = {"matrix": 2**-6, "head": 2**-8}.get(table[path].role, 1e-4)
        np.testing.assert_allclose(found, wanted, rtol=close, atol=close * scale, err_msg=path)


def test_a_tied_embeddings_gradient_is_not_rounded_by_pmap_either():
    """Its step takes the embedding's two gradients apart, as if the head were another matrix."""
    # In many chunks: the gradient of one is no finer than its bfloat16 operands.
    compute = dataclasses.replace(
        COMPUTE, dtype="bfloat16", gradient_dtype="bfloat16", loss_chunk_tokens=8
    )
    jitted = Case("llama-tied", compute=compute)
    mapped = Case("llama-tied", compute=compute, axis=AXIS)
    alone = make_mesh({"data": 1}, devices=jax.devices()[:1])
    steps = jax.jit(jitted.step), make_pmap_step(mapped.step, mapped.config, alone, num_beside=0)
    before = np.asarray(jitted.params["embed_tokens"]["weight"])
    moved = []
    for step in steps:
        after, _ = step(jax.tree.map(jnp.copy, jitted.state()), random_batch(4, seed=0))
        moved.append(np.asarray(after.params["embed_tokens"]["weight"]) - before)
    scale = np.abs(moved[0]).max()
    assert scale > 0
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-4, atol=1e-4 * scale)
