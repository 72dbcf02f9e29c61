"""Dropout before adapters: PEFT's, of every matrix, layer, step and micro-batch anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, Compute
from llama_jax.mesh.sharding import batch_sharding, make_mesh
from llama_jax.model.losses import next_token_loss
from llama_jax.weights.adapted import DroppedLora, LoraTensor
from llama_jax.weights.dot import dot
from llama_jax.weights.lora import add_lora, check_dropout, with_dropout
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.select import trainable_mask
from tests.tiny import FAMILIES, tiny_config, tiny_params
from tests.train.tiny_data import random_batch
from train.distill_pmap import AXIS, make_pmap_step
from train.optim import make_optimizer, make_schedule
from train.sections.optimizer import OptimizerSection
from train.sections.schedule import ScheduleSection
from train.state import init_state, state_shardings
from train.step import LossSums, make_eval_step, make_train_step

pytestmark = pytest.mark.compiled_quickly

COMPUTE = Compute(loss_chunk_tokens=64)
CONFIG = FAMILIES["llama-gqa"]
RATE = 0.25


def identity(size, base, key):
    """An adapter that gives what goes into it, on a base that gives `base` times that."""
    eye = jnp.eye(size)
    held = LoraTensor(base * eye, eye, eye, jnp.float32(1), (size,))
    return DroppedLora(**vars(held), key=jax.random.key_data(key), rate=RATE, axis=None)


def adapted(config=CONFIG, **more):
    """Tiny parameters whose adapters change something already."""
    params = tiny_params(config)
    params = add_lora(config, params, LoraConfig(r=4, **more), jax.random.key(1))
    rng = np.random.default_rng(0)

    def moved(leaf):
        drawn = rng.normal(scale=0.3, size=leaf.lora_b.shape).astype(np.float32)
        return dataclasses.replace(leaf, lora_b=jnp.asarray(drawn))

    return tree.map_with_path(
        lambda _, leaf: moved(leaf) if isinstance(leaf, LoraTensor) else leaf, params
    )


class Case:
    def __init__(self, rate, *, compute=COMPUTE, **options):
        self.params = adapted()
        mask = trainable_mask(CONFIG, self.params, None, method="lora")
        schedule = make_schedule(ScheduleSection(name="constant"), peak=1e-2, total_steps=10)
        section = OptimizerSection(name="sgd", max_grad_norm=None)
        optimizer = make_optimizer(CONFIG, self.params, mask, section, schedule)
        self.state = init_state(self.params, mask=mask, optimizer=optimizer, rng=jax.random.key(0))
        self.step = make_train_step(
            CONFIG, compute, optimizer=optimizer, mask=mask, lora_dropout=rate, **options
        )


def test_an_adapter_gets_what_is_left_divided_by_its_share_and_the_base_gets_all():
    x = jnp.ones((400, 50))
    found = np.asarray(dot(x, identity(50, 10.0, jax.random.key(3)), compute=Compute())) - 10
    np.testing.assert_allclose(np.unique(found.round(4)), [0, 1.3333])
    # 20,000 draws: four standard deviations of their share.
    assert abs((found == 0).mean() - RATE) < 4 * (RATE * (1 - RATE) / found.size) ** 0.5
    # The gradient of the sum by one row of A is the sum of what went into it.
    weight = identity(50, 10.0, jax.random.key(3))

    def total(lora_a):
        return dot(x, dataclasses.replace(weight, lora_a=lora_a), compute=Compute()).sum()

    gradient = jax.grad(total)(weight.lora_a)
    np.testing.assert_allclose(gradient[7], found.sum(axis=0), rtol=1e-5)


def test_every_matrix_and_layer_has_numbers_of_its_own():
    params = with_dropout(CONFIG, adapted(), jax.random.key(0), RATE, axis=None)
    dropped = [leaf for leaf in tree.flatten(params).values() if isinstance(leaf, DroppedLora)]
    assert len(dropped) == 7 and {leaf.rate for leaf in dropped} == {RATE}
    keys = np.concatenate([np.asarray(leaf.key).reshape(-1, 2) for leaf in dropped])
    assert len(np.unique(keys, axis=0)) == 7 * CONFIG.num_hidden_layers


def test_a_step_drops_anew_and_the_same_again_and_evaluation_drops_nothing():
    batch, case, plain = random_batch(), Case(RATE), Case(0.0)
    step = jax.jit(case.step)
    first, metrics = step(case.state, batch)
    again, same = step(case.state, batch)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    _, other = step(dataclasses.replace(case.state, step=jnp.int32(1)), batch)
    _, whole = jax.jit(plain.step)(plain.state, batch)
    losses = [float(each["loss"]) for each in (metrics, other, whole)]
    assert float(same["loss"]) == losses[0] and len(set(losses)) == 3
    sums = make_eval_step(CONFIG, COMPUTE)(case.params, batch)
    np.testing.assert_allclose(sums["loss"] / sums["weight"], losses[2], rtol=1e-6)


def test_micro_batches_drop_apart():
    """Two equal ones: their losses differ, so the mean square is more than the square mean."""
    row = random_batch(1)
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), row)

    def loss(config, params, part, *, compute):
        total, weight, stats = next_token_loss(config, params, part, compute=compute)
        return LossSums(total, weight, stats, {"squared": total**2 / weight})

    found = {}
    for rate in (0.0, RATE):
        case = Case(rate, loss=loss, accumulation_steps=2)
        _, metrics = jax.jit(case.step)(case.state, batch)
        found[rate] = float(metrics["squared"] / metrics["loss"] ** 2) - 1
    assert abs(found[0.0]) < 1e-6 < 1e-5 < found[RATE]


def test_recomputation_drops_the_same():
    batch = random_batch()
    outcomes = [
        jax.jit((case := Case(RATE, compute=Compute(loss_chunk_tokens=64, remat=remat))).step)(
            case.state, batch
        )
        for remat in ("none", "full")
    ]
    for a, b in zip(*(jax.tree.leaves(state.params) for state, _ in outcomes), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_any_mesh_drops_the_same():
    batch, case = random_batch(8), Case(RATE)
    expected, metrics = jax.jit(case.step)(case.state, batch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    places = state_shardings(CONFIG, case.state, mesh, DEFAULT_RULES)
    with jax.set_mesh(mesh):
        step = jax.jit(case.step, in_shardings=(places, batch_sharding(mesh, DEFAULT_RULES)))
        got, on_mesh = step(case.state, batch)
    np.testing.assert_allclose(on_mesh["loss"], metrics["loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.params, expected.params
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_pmap_drops_what_jit_drops(parts):
    """Each device the part that its rows have in all draws, in each micro-batch."""
    batch = random_batch(8)
    case, alone = (Case(RATE, accumulation_steps=parts, axis=axis) for axis in (AXIS, None))
    expected, metrics = jax.jit(alone.step)(alone.state, batch)
    four = make_mesh({"data": 4}, devices=jax.devices()[:4])
    got, found = make_pmap_step(case.step, CONFIG, four, num_beside=0)(case.state, batch)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.params, expected.params
    )


@pytest.mark.parametrize("rate", [1, -0.1, True, "0.1", float("nan")])
def test_a_rate_is_a_probability(rate):
    with pytest.raises(ValueError, match=r"lora\.lora_dropout is .* a probability"):
        LoraConfig(lora_dropout=rate)


def test_an_adapter_on_the_embedding_alone_drops_nothing_and_is_refused():
    config = tiny_config(tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"embed_tokens.weight alone has an adapter.* to 0"):
        check_dropout(config, adapted(config, target_modules=("embed_tokens",)))
    check_dropout(config, adapted(config, target_modules=("embed_tokens", "q_proj")))


@pytest.mark.parametrize(
    "config, targets, path",
    [
        (tiny_config(tie_word_embeddings=False), ("lm_head",), "lm_head"),
        (FAMILIES["mixtral"], ("w1", "w2", "w3"), r"experts\.w1"),
    ],
)
def test_what_is_multiplied_in_pieces_is_refused(config, targets, path):
    params = adapted(config, target_modules=targets)
    with pytest.raises(ValueError, match=rf"{path}.* leave it out"):
        check_dropout(config, params)
    with pytest.raises(ValueError, match=path):
        with_dropout(config, params, jax.random.key(0), RATE, axis=None)
