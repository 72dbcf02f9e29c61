"""Schedules against their values, optimizers against Optax, and that frozen means frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import tree
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.select import trainable_mask
from tests.tiny import FAMILIES, tiny_config, tiny_params
from train.config import RunConfig
from train.optim import Optimizer, make_optimizer, make_schedule, stochastically_rounded
from train.sections.optimizer import OPTIMIZER_DEFAULTS, OptimizerSection
from train.sections.schedule import ScheduleSection

pytestmark = pytest.mark.compiled_quickly

CONFIG = FAMILIES["llama-biases"]


def rates(section: ScheduleSection, steps: int, peak: float = 1.0) -> list[float]:
    schedule = make_schedule(section, peak=peak, total_steps=steps)
    return [float(schedule(k)) for k in range(steps)]


def constant(rate: float):
    return make_schedule(ScheduleSection(name="constant"), peak=rate, total_steps=100)


def test_r45_warm_up_values():
    found = rates(ScheduleSection(name="linear", warmup_steps=10), 20)
    np.testing.assert_allclose(found[:11], [k / 10 for k in range(11)], atol=1e-7)
    assert found[0] == 0.0 and found[5] == 0.5


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(
    ("warmup", "decay", "steps"), [(0, None, 5), (0, 0, 5), (5, None, 5), (5, 0, 5), (1, 0, 1)]
)
def test_r46_degenerate_lengths_give_finite_rates(name, warmup, decay, steps):
    if name == "wsd":
        decay = decay or 0
    if name == "constant":
        decay = None
    section = ScheduleSection(name=name, warmup_steps=warmup, decay_steps=decay)
    found = rates(section, steps, peak=0.5)
    assert np.isfinite(found).all()
    if warmup == 0:
        assert found[0] == 0.5
    if decay == 0:
        assert found[warmup:] == [0.5] * (steps - warmup), "a fall of no length does not happen"


def test_cosine_and_linear_fall_from_the_peak_to_the_final_ratio():
    cosine = rates(ScheduleSection(name="cosine", warmup_steps=2, final_ratio=0.1), 13)
    expected = [0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (k - 2) / 11)) for k in range(2, 13)]
    np.testing.assert_allclose(cosine[2:], expected, atol=1e-6)
    linear = rates(ScheduleSection(name="linear", warmup_steps=2, decay_steps=4), 10)
    np.testing.assert_allclose(linear, [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0], atol=1e-6)


def test_wsd_stays_and_falls_at_the_end():
    found = rates(ScheduleSection(name="wsd", warmup_steps=2, decay_steps=4, final_ratio=0.5), 10)
    np.testing.assert_allclose(found, [0, 0.5, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625], atol=1e-6)


KEY = jax.random.key(0)


def toy(params, mask, section: OptimizerSection, rate: float) -> tuple[Optimizer, dict]:
    """An optimizer over norms of a tiny model, which stand for any two arrays."""
    return make_optimizer(CONFIG, params, mask, section, constant(rate)), tree.partition(
        params, mask
    )[0]


def two_arrays():
    params = {"norm": {"weight": jnp.ones(1)}, "lm_head": {"weight": jnp.ones((1, 1))}}
    mask = {"norm": {"weight": True}, "lm_head": {"weight": False}}
    return params, mask


def test_r47_a_frozen_array_gets_no_update():
    params, mask = two_arrays()
    optimizer, trained = toy(params, mask, OptimizerSection(name="sgd"), 0.1)
    gradients = jax.tree.map(jnp.ones_like, trained)
    updated, _, _ = optimizer.update(gradients, optimizer.init(trained), trained, KEY)
    after = tree.combine(updated, tree.partition(params, mask)[1])
    np.testing.assert_allclose(after["norm"]["weight"] - 1.0, -0.1, atol=1e-7)
    assert after["lm_head"]["weight"] is params["lm_head"]["weight"]


def test_r48_clipping_sees_trained_arrays_alone():
    params, mask = two_arrays()
    section = OptimizerSection(name="sgd", max_grad_norm=3.0)
    optimizer, trained = toy(params, mask, section, 1.0)
    state = optimizer.init(trained)

    def gradient(value):
        return jax.tree.map(lambda x: jnp.full_like(x, value), trained)

    # The frozen gradient of norm 4 does not exist: only the 3 of the trained array is there.
    updated, _, metrics = optimizer.update(gradient(3.0), state, trained, KEY)
    assert float(metrics["grad_norm"]) == 3.0
    assert float(updated["norm"]["weight"][0]) == 1.0 - 3.0
    updated, _, metrics = optimizer.update(gradient(6.0), state, trained, KEY)
    assert float(metrics["grad_norm"]) == 6.0, "the norm before clipping is reported"
    assert float(updated["norm"]["weight"][0]) == 1.0 - 3.0


def lora_case():
    config = FAMILIES["llama-gqa"]
    params = add_lora(config, tiny_params(config), LoraConfig(r=4), jax.random.key(1))
    mask = trainable_mask(config, params, None, method="lora")
    return config, params, mask


def test_r49_the_optimizer_holds_two_values_for_each_trained_one():
    config, params, mask = lora_case()
    optimizer = make_optimizer(config, params, mask, OptimizerSection(), constant(1e-3))
    trained, frozen = tree.partition(params, mask)
    state = optimizer.init(trained)
    count = sum(x.size for x in jax.tree.leaves(trained))
    held = sum(x.size for x in jax.tree.leaves(state))
    assert 2 * count <= held <= 2 * count + 4
    base_shapes = {x.shape for x in jax.tree.leaves(frozen) if x.ndim >= 2}
    assert base_shapes.isdisjoint(x.shape for x in jax.tree.leaves(state))


def test_r50_adapters_decay_and_nothing_frozen_does():
    config, params, mask = lora_case()
    section = OptimizerSection(weight_decay=0.1)
    optimizer = make_optimizer(config, params, mask, section, constant(0.1))
    trained, frozen = tree.partition(params, mask)
    state = optimizer.init(trained)
    zero = jax.tree.map(jnp.zeros_like, trained)
    now = trained
    for _ in range(10):
        now, state, _ = optimizer.update(zero, state, now, KEY)
    factor = (1 - 0.1 * 0.1) ** 10
    before, after = tree.flatten_arrays(trained), tree.flatten_arrays(now)
    for path in before:
        np.testing.assert_allclose(after[path], before[path] * factor, rtol=1e-5)
    assert set(before).isdisjoint(tree.flatten_arrays(frozen))


@pytest.mark.parametrize("name", sorted(OPTIMIZER_DEFAULTS))
def test_r51_decay_is_by_role(name):
    """Norms are [layers, hidden] here: two axes, and still no decay."""
    params = tiny_params(CONFIG)
    mask = jax.tree.map(lambda _: True, params)
    section = OptimizerSection(name=name, weight_decay=0.1)
    optimizer = make_optimizer(CONFIG, params, mask, section, constant(0.5))
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _, _ = optimizer.update(zero, optimizer.init(params), params, KEY)
    for path, old in tree.flatten_arrays(params).items():
        new = tree.flatten_arrays(after)[path]
        if "norm" in path or path.endswith("bias"):
            np.testing.assert_array_equal(new, old, err_msg=path)
        else:
            np.testing.assert_allclose(new, old * 0.95, rtol=1e-5, err_msg=path)


def reference(section: OptimizerSection, rate: float):
    """What Optax itself offers under the name."""
    decay = section.weight_decay
    match section.name:
        case "adamw":
            return optax.adamw(
                rate, b1=section.beta1, b2=section.beta2, eps=section.epsilon, weight_decay=decay
            )
        case "lion":
            return optax.lion(rate, b1=section.beta1, b2=section.beta2, weight_decay=decay)
        case "sgd":
            return optax.chain(
                optax.trace(section.momentum),
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(rate),
            )
        case "adafactor":
            return optax.chain(
                optax.adafactor(
                    None,
                    decay_rate=section.decay_rate,
                    eps=section.epsilon,
                    multiply_by_parameter_scale=False,
                ),
                optax.scale(-1.0),
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(rate),
            )
        case "muon":
            # Optax's rule of [in, out] matrices, applied to ours, which are [out, in].
            return optax.contrib.muon(
                rate,
                beta=section.momentum,
                eps=section.epsilon,
                weight_decay=decay,
                muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-1, -2),
                consistent_rms=0.2,
            )


@pytest.mark.parametrize(
    "section",
    [
        OptimizerSection(name="adamw", weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-5),
        OptimizerSection(name="lion", weight_decay=0.1, beta1=0.8, beta2=0.95),
        OptimizerSection(name="sgd", weight_decay=0.1, momentum=0.9),
        OptimizerSection(name="adafactor", weight_decay=0.1, decay_rate=0.7),
        OptimizerSection(name="muon", weight_decay=0.1, momentum=0.9),
    ],
    ids=lambda section: section.name,
)
def test_updates_equal_optax(section):
    config = tiny_config(hidden_size=128, intermediate_size=160, num_hidden_layers=1)
    path = ("layers", "mlp", "up_proj", "weight")
    shape = (1, 160, 128)
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=shape), jnp.float32)
    gradients = [jnp.asarray(rng.normal(size=shape) * 1e-3, jnp.float32) for _ in range(3)]

    def nested(value):
        for name in reversed(path):
            value = {name: value}
        return value

    params, mask = nested(start), nested(True)
    optimizer = make_optimizer(
        config, params, mask, section.replace(max_grad_norm=None), constant(0.01)
    )
    state, theirs = optimizer.init(params), reference(section, 0.01)
    with jax.numpy_dtype_promotion("standard"):
        their_params, their_state = start[0], theirs.init(start[0])
        for gradient in gradients:
            params, state, _ = optimizer.update(nested(gradient), state, params, KEY)
            updates, their_state = theirs.update(gradient[0], their_state, their_params)
            their_params = optax.apply_updates(their_params, updates)
    ours = jax.tree.leaves(params)[0][0]
    np.testing.assert_allclose(ours, their_params, atol=2e-6)
    assert float(jnp.abs(ours - start[0]).max()) > 1e-3
    assert int(state.count) == 3


def test_muon_takes_matrices_and_adam_the_rest():
    params = tiny_params(CONFIG)
    mask = jax.tree.map(lambda _: True, params)
    section = OptimizerSection(name="muon", max_grad_norm=None)
    optimizer = make_optimizer(CONFIG, params, mask, section, constant(1.0))
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    after, _, _ = optimizer.update(gradients, optimizer.init(params), params, KEY)
    steps = tree.flatten_arrays(jax.tree.map(jnp.subtract, params, after))
    # Adam's first update is the sign of the gradient; Muon's is an orthogonal matrix, scaled.
    np.testing.assert_allclose(np.abs(steps["lm_head.weight"]), 1.0, atol=1e-3)
    step = np.asarray(steps["layers.self_attn.q_proj.weight"][1])
    singular = np.linalg.svd(step / (0.2 * np.sqrt(max(step.shape))), compute_uv=False)
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_moments_and_updates_are_float32_for_bfloat16_parameters():
    config = FAMILIES["llama-gqa"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params(config))
    mask = jax.tree.map(lambda _: True, params)
    optimizer = make_optimizer(config, params, mask, OptimizerSection(), constant(1e-2))
    state = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.inner) if x.ndim} == {jnp.dtype("float32")}
    after, _, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params, KEY)
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}


def test_rounding_by_chance_is_exact_on_average_and_keeps_what_needs_none():
    exact = jnp.asarray([1.0, -2.5, 0.0, jnp.inf, -jnp.inf], jnp.float32)
    assert stochastically_rounded(exact, KEY).tolist() == exact.tolist()
    assert jnp.isnan(stochastically_rounded(jnp.float32(jnp.nan), KEY))
    # A quarter of the way from 1 to its neighbour, and the same below zero.
    value = 1 + 2.0**-9
    rounded = stochastically_rounded(jnp.full(20_000, value), KEY).astype(jnp.float32)
    assert set(rounded.tolist()) == {1.0, 1 + 2.0**-7}
    assert float(rounded.mean()) == pytest.approx(value, abs=2.0**-7 * 0.02)
    below = stochastically_rounded(jnp.full(20_000, -value), KEY).astype(jnp.float32)
    assert float(below.mean()) == pytest.approx(-value, abs=2.0**-7 * 0.02)


@pytest.mark.parametrize("by_chance", [True, False])
def test_small_updates_of_bfloat16_add_up_only_when_rounded_by_chance(by_chance):
    params = {"lm_head": {"weight": jnp.ones((100, 10), jnp.bfloat16)}}
    section = OptimizerSection(name="sgd", max_grad_norm=None, stochastic_rounding=by_chance)
    mask = {"lm_head": {"weight": True}}
    optimizer = make_optimizer(CONFIG, params, mask, section, constant(2.0**-11))
    state = optimizer.init(params)
    for _ in range(32):  # together four times the last bit of a number just below one
        gradients = jax.tree.map(jnp.ones_like, params)
        params, state, _ = optimizer.update(gradients, state, params, KEY)
    mean = float(params["lm_head"]["weight"].astype(jnp.float32).mean())
    assert mean == pytest.approx(1 - 2.0**-6 if by_chance else 1.0, abs=0.0006)


def test_rounding_by_chance_needs_bfloat16_weights():
    values = {
        "model": {"name": "m"},
        "data": {"train": "a.jsonl"},
        "method": "full",
        "train": {"steps": 1, "batch_size": 1, "sequence_length": 8},
        "optimizer": {"stochastic_rounding": True},
        "output": "o",
    }
    with pytest.raises(ValueError, match="compute.param_dtype is float32: only bfloat16"):
        RunConfig.from_dict(values)
    values["compute"] = {"param_dtype": "bfloat16"}
    assert RunConfig.from_dict(values).optimizer.stochastic_rounding
