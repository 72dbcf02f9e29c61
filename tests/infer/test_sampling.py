"""The sampler against hand-computed distributions and transformers' own processors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infer.params import SamplingParams
from infer.sampling import (
    Needs,
    Rows,
    Seen,
    draw,
    edit,
    filtered_logits,
    sample,
    token_logprobs,
)

pytestmark = pytest.mark.compiled_quickly

NO_END = np.zeros(0, np.int32)

# Compiled once per shape and variant; run eagerly, every branch would be compiled at each call.
run_sample = jax.jit(sample, static_argnames="needs")
run_filters = jax.jit(filtered_logits)
run_draw = jax.jit(draw, static_argnames="candidates")
run_edit = jax.jit(edit)
run_logprobs = jax.jit(token_logprobs, static_argnames="num")


FULL = Needs(sample=True, edit=True, top_logprobs=20)
ROWS = 8


def padded(logits):
    """Rows up to 8 and words up to 512 or 4096 (forbidden ones), so that few shapes compile."""
    logits = jnp.asarray(logits)
    rows, words = logits.shape
    size = next((size for size in (512, 4096) if size >= words), words)
    wide = jnp.full((ROWS, size), -jnp.inf, logits.dtype).at[:rows, :words].set(logits)
    return wide.at[rows:].set(0)


def rows_of(params, vocab_size, *, seeds=None, choices=None, needs=FULL):
    filling = [SamplingParams(temperature=0)] * max(0, ROWS - len(params))
    rest = [0] * len(filling)
    seeds = [p.seed or 0 for p in params] if seeds is None else list(seeds)
    choices = [0] * len(params) if choices is None else choices
    return jax.device_put(
        Rows.of(
            [*params, *filling],
            seeds=seeds + rest,
            choices=choices + rest,
            vocab_size=vocab_size,
            needs=needs,
        )
    )


def sampled(logits, params, *, step=0, allowed=None, end=NO_END, needs=FULL, **kwargs):
    count = len(params)
    logits = padded(logits)
    size, vocab_size = logits.shape
    nothing = np.zeros(size, np.int32)
    seen = Seen.of_prompts(nothing[:, None], nothing, vocab_size=vocab_size)
    got = run_sample(
        logits,
        rows_of(params, vocab_size, needs=needs, **kwargs),
        step=np.full(size, step, np.int32),
        needs=needs,
        seen=seen if needs.edit else None,
        allowed=np.pad(
            np.ones(vocab_size, bool) if allowed is None else allowed,
            (0, vocab_size - (vocab_size if allowed is None else len(allowed))),
        ),
        end_tokens=end,
    )
    return jax.tree.map(lambda x: np.asarray(x)[:count], got)


def probabilities(logits, params):
    count, words = np.shape(logits)
    wide = padded(logits)
    filtered = run_filters(wide, rows_of([params] * count, wide.shape[1]))
    return np.asarray(jax.nn.softmax(filtered))[:count, :words]


# Greedy


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-8])
def test_zero_temperature_is_argmax_with_the_lowest_id_on_ties(temperature):  # R85
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [-1.0, -np.inf, -1.0, -2.0]], np.float32)
    for _ in range(2):
        got = sampled(logits, [SamplingParams(temperature=temperature)] * 2)
        assert got.tokens.tolist() == [1, 0]


def test_a_greedy_row_beside_a_sampling_row_with_bans():  # R85
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 50)).astype(np.float32)
    logits[1, ::2] = -np.inf
    params = [SamplingParams(temperature=0), SamplingParams(seed=3, logprobs=2)]
    both = sampled(logits, params)
    alone = sampled(logits[1:], params[1:])
    assert both.tokens[0] == logits[0].argmax()
    assert both.tokens[1] == alone.tokens[0] and both.tokens[1] % 2 == 1
    assert np.isfinite(both.logprob).all()
    swapped = sampled(logits[::-1].copy(), params[::-1])
    assert swapped.tokens.tolist() == both.tokens.tolist()[::-1]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 0}])
def test_ways_to_be_greedy_agree_on_repeating_bf16_logits(params):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4096)), jnp.bfloat16)
    wanted = np.asarray(logits.astype(jnp.float32)).argmax(axis=1)
    for step in range(5):
        assert (sampled(logits, [SamplingParams(seed=step, **params)] * 4).tokens == wanted).all()


def test_the_cheaper_variants_give_the_same_tokens():
    logits = np.random.default_rng(12).normal(size=(4, 500)).astype(np.float32)
    for params in ([SamplingParams(temperature=0)] * 4, [SamplingParams(seed=5, top_p=0.9)] * 4):
        needs = Needs.of(params)
        assert not needs.edit and needs.top_logprobs is None
        cheap = sampled(logits, params, needs=needs)
        assert cheap.logprob is None and cheap.top_tokens is None
        np.testing.assert_array_equal(cheap.tokens, sampled(logits, params).tokens)


def test_extreme_temperatures_stay_finite():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    np.testing.assert_allclose(probabilities(logits, SamplingParams(temperature=1e-4)), [[1, 0, 0]])
    flat = probabilities(logits, SamplingParams(temperature=1e30))
    np.testing.assert_allclose(flat, np.full((1, 3), 1 / 3), rtol=1e-6)


def test_no_choosable_token_is_reported_not_invented():
    nan = np.array([[0.0, np.nan], [-np.inf, -np.inf], [0.0, 1.0], [np.inf, 0.0]], np.float32)
    for params in (SamplingParams(temperature=0), SamplingParams(seed=0)):
        assert sampled(nan, [params] * 4).tokens.tolist()[:2] == [-1, -1]
        assert sampled(nan, [params] * 4).tokens[2] in (0, 1)
        assert sampled(nan, [params] * 4).tokens[3] == -1


# Filters


@pytest.mark.parametrize("top_p", [0.0, 1e-8, 1e-3])
def test_small_top_p_is_the_most_likely_token_in_bf16(top_p):  # R86
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4096)) * 4, jnp.bfloat16)
    best = np.asarray(logits.astype(jnp.float32)).argmax()
    kept = probabilities(logits, SamplingParams(top_p=top_p))
    assert kept[0, best] == 1 and (kept > 0).sum() == 1
    for step in range(10):
        assert sampled(logits, [SamplingParams(top_p=top_p, seed=step)]).tokens[0] == best


def test_top_p_one_keeps_all():  # R86
    logits = np.random.default_rng(3).normal(size=(1, 4096)).astype(np.float32) * 10
    assert (probabilities(logits, SamplingParams(top_p=1.0)) > 0).all()
    assert (
        sampled(logits, [SamplingParams(top_p=1.0, seed=1)]).tokens
        == sampled(logits, [SamplingParams(seed=1)]).tokens
    )


@pytest.mark.parametrize("vocab_size", [4, 128256])
def test_min_p(vocab_size):  # R87
    logits = np.full((1, vocab_size), -1e4, np.float32)
    places = [0, 1, 2, 3] if vocab_size == 4 else [128255, 77, 5000, 3]
    logits[0, places] = np.log([0.5, 0.3, 0.15, 0.05])
    got = probabilities(logits, SamplingParams(min_p=0.2))
    np.testing.assert_allclose(got[0, places], [0.526316, 0.315789, 0.157895, 0], atol=1e-6)
    tokens = {
        int(sampled(logits, [SamplingParams(min_p=0.2, seed=s)]).tokens[0]) for s in range(30)
    }
    assert tokens == set(places[:3])


def test_exactly_k_survive_and_ties_go_to_the_lowest_ids():
    logits = np.array([[1.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    got = probabilities(logits, SamplingParams(top_k=2))
    np.testing.assert_allclose(got, [[0, 0.5, 0.5, 0, 0]], atol=1e-7)
    got = probabilities(logits, SamplingParams(top_p=0.5))
    assert (got[0] > 0).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("top_k", [10**6, 0, -1, 300])
def test_top_k_off(top_k):  # R96
    logits = np.random.default_rng(4).normal(size=(1, 300)).astype(np.float32)
    assert (probabilities(logits, SamplingParams(top_k=top_k)) > 0).all()


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 7},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 3.0},
        {"top_k": 40, "top_p": 0.8, "temperature": 0.7},
        {"min_p": 0.05, "temperature": 1.5},
        {"top_k": 100, "top_p": 0.95, "min_p": 0.02, "temperature": 1.3},
    ],
)
def test_filters_equal_transformers(params):
    logits = np.random.default_rng(5).normal(size=(3, 2000)).astype(np.float32) * 3
    wishes = SamplingParams(**params)
    scores = TemperatureLogitsWarper(float(wishes.temperature))(None, torch.from_numpy(logits))
    if "top_k" in params:
        scores = TopKLogitsWarper(wishes.top_k)(None, scores)
    if "top_p" in params:
        scores = TopPLogitsWarper(wishes.top_p)(None, scores)
    if "min_p" in params:
        scores = MinPLogitsWarper(wishes.min_p)(None, scores)
    got = probabilities(logits, wishes)
    np.testing.assert_allclose(got, torch.softmax(scores, -1).numpy(), atol=1e-6)
    assert ((got > 0) == torch.isfinite(scores).numpy()).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_to_find_the_survivors_draw_the_same(dtype):
    """With few candidates the search runs, with all of them it never does."""
    rng = np.random.default_rng(6)
    kinds = [
        {"top_k": 5},
        {"top_k": 60, "top_p": 0.9},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_p": 0.99, "min_p": 0.001},
        {"temperature": 2.0},
        {"top_k": 300, "top_p": 0.5, "min_p": 0.01},
        {"temperature": 0},
    ]
    params = [SamplingParams(seed=i, **kind) for i, kind in enumerate(kinds)]
    logits = jnp.asarray(rng.normal(size=(len(kinds), 400)) * 2, dtype)
    rows = rows_of(params, 400)
    sampling = np.array([not p.is_greedy for p in params])
    allowed = np.asarray(run_filters(logits, rows)) > -np.inf
    for step in range(20):
        steps = jnp.full(len(kinds), step, jnp.int32)
        wide = logits.astype(jnp.float32)
        tokens = [
            np.asarray(run_draw(wide, rows, step=steps, candidates=count)) for count in (1, 32, 400)
        ]
        np.testing.assert_array_equal(tokens[0][sampling], tokens[1][sampling])
        np.testing.assert_array_equal(tokens[1][sampling], tokens[2][sampling])
        assert allowed[np.arange(len(kinds)), tokens[0]][sampling].all()


def test_draws_follow_the_distribution():
    """Frequencies of 20,000 draws lie within five standard deviations, at fixed seeds."""
    wanted = np.array([0.5, 0.3, 0.15, 0.049, 0.001])
    count = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(wanted, jnp.float32)), (count, 5))
    params = [SamplingParams()] * count
    bound = 5 * np.sqrt(wanted * (1 - wanted) / count)
    for seeds, steps in ((range(count), [0] * count), ([7] * count, range(count))):
        rows = rows_of(params, 5, seeds=seeds)
        tokens = run_draw(logits, rows, step=np.asarray(steps, np.int32))
        share = np.bincount(tokens, minlength=5) / count
        assert (np.abs(share - wanted) < bound).all()


# Penalties, bias, bans


def one_row(params, vocab_size):
    return Rows.of([params], seeds=[0], choices=[0], vocab_size=vocab_size, needs=FULL)


def test_repetition_penalty_counts_prompt_and_output_but_not_padding():  # R88
    logits = np.zeros((1, 6), np.float32)
    logits[0, [1, 2, 3, 4]] = [2.0, -2.0, 2.0, 2.0]
    seen = Seen.of_prompts(jnp.array([[1, 2, 4]]), jnp.array([2]), vocab_size=6)
    seen = seen.add(jnp.array([3]))
    rows = one_row(SamplingParams(repetition_penalty=2.0), 6)
    got = run_edit(jnp.asarray(logits), rows, step=jnp.array([1]), seen=seen, end_tokens=NO_END)
    np.testing.assert_array_equal(got, [[0, 1.0, -4.0, 1.0, 2.0, 0]])
    ids = torch.tensor([[1, 2, 3]])
    reference = RepetitionPenaltyLogitsProcessor(2.0)(ids, torch.from_numpy(logits.copy()))
    np.testing.assert_array_equal(got, reference)


def test_frequency_and_presence_count_the_output_only():  # R88
    logits = np.array([[1.0, 1.0, 1.0]], np.float32)
    seen = Seen.of_prompts(jnp.array([[0, 0, 0]]), jnp.array([3]), vocab_size=3)
    seen = seen.add(jnp.array([0])).add(jnp.array([0]))
    for params, wanted in (
        ({"frequency_penalty": 0.5}, [0.0, 1.0, 1.0]),
        ({"presence_penalty": 0.5}, [0.5, 1.0, 1.0]),
        ({"frequency_penalty": -1.0, "presence_penalty": 2.0}, [1.0, 1.0, 1.0]),
    ):
        rows = one_row(SamplingParams(**params), 3)
        got = run_edit(jnp.asarray(logits), rows, step=jnp.array([2]), seen=seen, end_tokens=NO_END)
        np.testing.assert_array_equal(got, [wanted])


def test_bias_and_bans():
    logits = np.array([[3.0, 2.0, 1.0, 0.0]] * 3, np.float32)
    greedy = SamplingParams(temperature=0)
    params = [
        greedy.replace(logit_bias={0: -100, 2: 5.5}),
        greedy.replace(logit_bias={0: -100}),
        greedy,
    ]
    assert sampled(logits, params).tokens.tolist() == [2, 1, 0]
    allowed = np.array([False, True, True, True])
    assert sampled(logits, params, allowed=allowed).tokens.tolist() == [2, 1, 1]


def test_end_tokens_are_forbidden_before_min_tokens():
    logits = np.array([[3.0, 2.0, 1.0]] * 2, np.float32)
    params = [SamplingParams(temperature=0, min_tokens=2), SamplingParams(temperature=0)]
    end = np.array([0, 1], np.int32)
    assert sampled(logits, params, step=1, end=end).tokens.tolist() == [2, 0]
    assert sampled(logits, params, step=2, end=end).tokens.tolist() == [0, 0]


# Seeds


def test_a_draw_depends_on_seed_choice_and_step_only():  # R89
    logits = np.random.default_rng(8).normal(size=(1, 1000)).astype(np.float32)
    mine = SamplingParams(seed=11)
    alone = [int(sampled(logits, [mine], step=s).tokens[0]) for s in range(8)]
    batch = np.concatenate([logits * 2, logits, logits])
    params = [SamplingParams(seed=99, top_p=0.5), mine, SamplingParams(temperature=0)]
    for slot in (1, 0, 2):
        order = np.roll(np.arange(3), slot - 1)
        got = [
            int(sampled(batch[order], [params[i] for i in order], step=s).tokens[slot])
            for s in range(8)
        ]
        assert got == alone
    assert len(set(alone)) > 4
    other = [int(sampled(logits, [mine], step=s, choices=[1]).tokens[0]) for s in range(8)]
    assert other != alone


def test_all_64_bits_of_a_seed_count():
    logits = np.zeros((4, 5000), np.float32)
    seeds = [5, 5 + 2**32, 5 + 2**63, -5]
    tokens = sampled(logits, [SamplingParams()] * 4, seeds=seeds).tokens.tolist()
    assert len(set(tokens)) == 4


# Log probabilities


def test_logprobs_are_the_models_own():  # R91
    logits = np.random.default_rng(9).normal(size=(2, 200)).astype(np.float32) * 3
    params = [
        SamplingParams(seed=1, top_p=0.1, temperature=0.3, logprobs=3, logit_bias={7: -100})
    ] * 2
    got = sampled(logits, params)
    wanted = np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got.logprob, wanted[[0, 1], got.tokens], atol=1e-5)
    order = np.argsort(-logits, axis=1)[:, :20]
    assert (got.logprob < -0.01).all() and not (got.tokens == 7).any()
    np.testing.assert_array_equal(got.top_tokens, order)
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(wanted, order, 1), atol=1e-5)
    _, every, _ = run_logprobs(jnp.asarray(logits), got.tokens, num=200)
    np.testing.assert_allclose(np.exp(every).sum(axis=1), 1, atol=1e-5)


def test_nothing_compiles_when_parameters_change():
    run = jax.jit(sample, static_argnames="needs")
    rng = np.random.default_rng(10)
    sizes = []
    for i in range(12):
        p = SamplingParams(
            temperature=float(rng.uniform(0, 2)),
            top_p=float(rng.uniform()),
            top_k=int(rng.integers(-1, 90)),
            min_p=float(rng.uniform()),
            repetition_penalty=float(rng.uniform(0.5, 2)),
            logit_bias={int(rng.integers(64)): 1.0},
            seed=i,
        )
        rows = Rows.of([p], seeds=[i], choices=[0], vocab_size=64, needs=FULL)
        seen = Seen.of_prompts(np.zeros((1, 4), np.int32), np.ones(1, np.int32), vocab_size=64)
        step = np.full(1, i, np.int32)
        run(np.zeros((1, 64), np.float32), rows, step=step, needs=FULL, seen=seen, allowed=None,
            end_tokens=NO_END)  # fmt: skip
        sizes.append(run._cache_size())
    assert len(set(sizes)) == 1


# The parameters themselves


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 1e39),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("min_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 1e39),
        ("frequency_penalty", 2.5),
        ("presence_penalty", float("inf")),
        ("max_tokens", -1),
        ("n", 0),
        ("n", 10**6),
        ("logprobs", 10**6),
        ("logprobs", True),
        ("seed", 2**64),
        ("seed", 1.0),
        ("seed", np.float32(1.0)),
        ("n", np.True_),
        ("temperature", np.True_),
        ("temperature", np.float32("nan")),
        ("max_tokens", np.array([5])),
        ("stop", ("",)),
        ("stop", None),
        ("stop", 5),
        ("stop", b"x"),
        ("stop", {"x": 1}),
        ("stop", ("x",) * 10**5),
        ("stop", None),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop", b"x"),
        ("logit_bias", {3: 101}),
        ("logit_bias", {-1: 0}),
        ("logit_bias", dict.fromkeys(range(10**6), 1.0)),
        ("echo", "yes"),
        ("min_tokens", -3),
    ],
)
def test_a_parameter_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_numbers_of_numpy_are_numbers():
    given = {"max_tokens": np.int64(5), "seed": np.uint64(2**64 - 1), "n": np.int8(2)}
    wishes = SamplingParams(
        temperature=np.float32(0.5), logit_bias={np.int32(3): np.float16(2)}, **given
    )
    assert wishes == SamplingParams(
        max_tokens=5, seed=2**64 - 1, n=2, temperature=0.5, logit_bias={3: 2.0}
    )
    assert {type(getattr(wishes, name)) for name in given} == {int}
    assert type(wishes.temperature) is float
    assert json.loads(json.dumps(dataclasses.asdict(wishes)))["logit_bias"] == {"3": 2.0}


def test_the_most_that_may_be_asked_for_keeps_logits_finite():
    values = np.array([[100.0, -100.0, 0.0, -np.inf]], np.float32)
    logits, nothing = padded(values), np.zeros(ROWS, np.int32)
    prompts = np.tile(np.arange(4, dtype=np.int32), (ROWS, 1))
    seen = Seen.of_prompts(prompts, nothing + 4, vocab_size=512)
    for name, value in (
        ("repetition_penalty", 1e-3),
        ("repetition_penalty", 1e3),
        ("temperature", 1e30),
    ):
        rows = rows_of([SamplingParams(**{name: value})], 512)
        edited = run_edit(logits, rows, step=nothing, seen=seen, end_tokens=NO_END)
        got = np.asarray(run_filters(edited, rows))[0, :4]
        assert np.isfinite(np.asarray(edited)[0, :3]).all(), name
        assert np.isfinite(got[:3]).all() and got[3] == -np.inf, name


def test_unknown_parameters_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="'temprature'.*'temperature'"):
        SamplingParams.from_dict({"temprature": 1})


def test_token_limits():  # R95
    assert SamplingParams().limit_tokens(10, 4096) == 256
    assert SamplingParams().limit_tokens(4000, 4096) == 96
    assert SamplingParams(max_tokens=0).limit_tokens(10, 4096) == 0
    assert SamplingParams(max_tokens=10**9).limit_tokens(10, 4096) == 4086
