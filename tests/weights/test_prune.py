"""Pruning: what goes, what stays, and zeros that stay zero in training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import cli, tree
from llama_jax.config import Compute
from llama_jax.formats.hf import load_hf, save_hf
from llama_jax.model.transformer import forward
from llama_jax.weights.importance import measure
from llama_jax.weights.prune import (
    drop_heads,
    drop_layers,
    drop_units,
    prunable,
    prune_weights,
    sparsity_of,
)
from llama_jax.weights.quantize import quantize
from llama_jax.weights.select import trainable_mask, zeros_mask
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens
from tests.train.test_loop import config as run_config
from tests.train.tiny_data import byte_tokenizer, random_batch, write_rows
from train.loop import train
from train.optim import make_optimizer, make_schedule
from train.sections.optimizer import OptimizerSection
from train.sections.schedule import ScheduleSection
from train.state import init_state
from train.step import make_train_step

pytestmark = pytest.mark.compiled_quickly

CONFIG = FAMILIES["llama-gqa"]
ROWS = [*tiny_tokens(3, 11), tiny_tokens(1, 7, seed=1)[0]]


def inputs_of(config, params, rows):
    """Path -> [L, in] sums of squared inputs, from the layers written out below."""
    found = {}
    layers = params["layers"]
    for layer in range(config.num_hidden_layers):
        for row in rows:
            x = params["embed_tokens"]["weight"][jnp.asarray(row)][None]
            for number in range(layer + 1):
                one = jax.tree.map(lambda leaf, i=number: leaf[i], layers)
                x, seen = plain_layer(config, one, x)
            for path, value in seen.items():
                sums = found.setdefault(path, np.zeros((config.num_hidden_layers, value.shape[-1])))
                sums[layer] += np.square(np.asarray(value[0], np.float64)).sum(0)
    return found


def plain_layer(config, params, x):
    """A Llama layer in a few lines of NumPy-like code, with the inputs of its matrices."""

    def norm(x, weight):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def turn(x):
        size = config.head_dim
        angles = np.arange(x.shape[1])[:, None] * config.rope_theta ** (
            -np.arange(0, size, 2, dtype=np.float32) / size
        )
        cos, sin = (jnp.asarray(f(angles), jnp.float32)[None, :, None] for f in (np.cos, np.sin))
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    attn, mlp = params["self_attn"], params["mlp"]
    first = norm(x, params["input_layernorm"]["weight"])

    def heads(name):
        out = first @ attn[name]["weight"].T
        return out.reshape(*x.shape[:2], -1, config.head_dim)

    q, k, v = turn(heads("q_proj")), turn(heads("k_proj")), heads("v_proj")
    k, v = (jnp.repeat(each, config.num_query_groups, axis=2) for each in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.float32(np.sqrt(config.head_dim))
    causal = np.tril(np.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    mixed = jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(*x.shape[:2], -1)
    x = x + mixed @ attn["o_proj"]["weight"].T
    second = norm(x, params["post_attention_layernorm"]["weight"])
    hidden = jax.nn.silu(second @ mlp["gate_proj"]["weight"].T) * (
        second @ mlp["up_proj"]["weight"].T
    )
    seen = {
        "layers.self_attn.q_proj.weight": first,
        "layers.self_attn.v_proj.weight": first,
        "layers.self_attn.o_proj.weight": mixed,
        "layers.mlp.up_proj.weight": second,
        "layers.mlp.down_proj.weight": hidden,
    }
    return x + hidden @ mlp["down_proj"]["weight"].T, seen


@pytest.fixture(scope="module")
def measured():
    return measure(CONFIG, tiny_params(CONFIG), ROWS, compute=Compute())


def test_inputs_are_those_of_the_model(measured):
    expected = inputs_of(CONFIG, tiny_params(CONFIG), ROWS)
    for path, squares in expected.items():
        np.testing.assert_allclose(measured.squares[path], squares, rtol=1e-4, err_msg=path)
    assert set(measured.squares) == set(prunable(CONFIG))
    assert measured.tokens == sum(len(row) for row in ROWS)


def test_a_layer_that_does_nothing_has_no_influence():
    config = tiny_config(num_hidden_layers=4)
    leaves = tree.flatten(tiny_params(config))
    for path in ("layers.self_attn.o_proj.weight", "layers.mlp.down_proj.weight"):
        leaves[path] = leaves[path].at[2].set(0)
    params = tree.unflatten(leaves)
    found = measure(config, params, ROWS, compute=Compute())
    assert found.influence[2] == pytest.approx(0, abs=1e-6)
    assert (np.delete(found.influence, 2) > 0.01).all()
    smaller, kept, layers = drop_layers(config, params, 3, found)
    assert layers == [0, 1, 3] and smaller.num_hidden_layers == 3
    tokens = jnp.asarray(tiny_tokens())
    np.testing.assert_allclose(
        forward(smaller, kept, tokens), forward(config, params, tokens), atol=1e-5
    )


def test_magnitude_takes_the_smallest_of_each_matrix():
    params = tiny_params(CONFIG)
    found = prune_weights(CONFIG, params, sparsity=0.5, skip=["k_proj"])
    for path, leaf in tree.flatten(params).items():
        pruned = np.asarray(tree.flatten(found)[path])
        if path not in prunable(CONFIG, ["k_proj"]):
            np.testing.assert_array_equal(pruned, leaf)
            continue
        for matrix, original in zip(pruned, np.asarray(leaf), strict=True):
            gone = matrix == 0
            assert gone.sum() == gone.size // 2
            np.testing.assert_array_equal(matrix[~gone], original[~gone])
            assert np.abs(original[gone]).max() <= np.abs(original[~gone]).min()
    assert sparsity_of(found, prunable(CONFIG, ["k_proj"])) == 0.5


def test_wanda_weighs_by_the_inputs_and_compares_within_rows(measured):
    params = tiny_params(CONFIG)
    found = prune_weights(CONFIG, params, sparsity=0.25, importance=measured)
    for path in prunable(CONFIG):
        leaf, pruned = (np.asarray(tree.flatten(t)[path]) for t in (params, found))
        score = np.abs(leaf) * np.sqrt(measured.squares[path])[:, None, :]
        gone = pruned == 0
        assert (gone.sum(-1) == round(0.25 * leaf.shape[-1])).all()
        most_gone = np.where(gone, score, -np.inf).max(-1)
        least_kept = np.where(gone, np.inf, score).min(-1)
        assert (most_gone <= least_kept).all()
    plain = prune_weights(CONFIG, params, sparsity=0.25)
    path = "layers.self_attn.o_proj.weight"
    assert not np.array_equal(tree.flatten(plain)[path], tree.flatten(found)[path])


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_patterns_keep_n_of_m_neighbours(pattern, measured):
    kept, group = pattern
    for importance in (None, measured):
        found = prune_weights(CONFIG, tiny_params(CONFIG), pattern=pattern, importance=importance)
        for path in prunable(CONFIG):
            groups = np.asarray(tree.flatten(found)[path]).reshape(-1, group)
            assert ((groups != 0).sum(-1) == kept).all()


@pytest.mark.parametrize("family", ["mixtral", "llama-biases", "llama-tied"])
def test_every_family_is_pruned_and_made_smaller(family):
    config = FAMILIES[family]
    params = tiny_params(config)
    found = measure(config, params, ROWS, compute=Compute())
    assert set(found.squares) == set(prunable(config))
    pruned = prune_weights(config, params, sparsity=0.5, importance=found)
    assert sparsity_of(pruned, prunable(config)) == 0.5
    smaller, params = drop_units(config, params, 40, found)
    smaller, params = drop_heads(smaller, params, 1)
    assert (smaller.intermediate_size, smaller.num_key_value_heads) == (40, 1)
    assert np.isfinite(forward(smaller, params, jnp.asarray(tiny_tokens()))).all()


def test_tokens_of_experts_are_those_sent_to_them():
    config = FAMILIES["mixtral"]
    found = measure(config, tiny_params(config), ROWS, compute=Compute())
    prefix = "layers.block_sparse_moe.experts"
    per_expert = found.squares[f"{prefix}.w1.weight"].sum(-1)  # [L, E]
    # Two of four experts see each token: together twice what one dense layer would see.
    assert per_expert.shape == (2, 4) and (per_expert > 0).all()
    assert found.squares[f"{prefix}.w2.weight"].shape == (2, 4, 96)


def test_units_and_heads_that_add_nothing_go_first(measured):
    leaves = tree.flatten(tiny_params(CONFIG))
    down = leaves["layers.mlp.down_proj.weight"]
    leaves["layers.mlp.down_proj.weight"] = down.at[0, :, 5].set(0).at[1, :, 7].set(0)
    out = leaves["layers.self_attn.o_proj.weight"]
    leaves["layers.self_attn.o_proj.weight"] = out.at[:, :, :32].set(0)  # key/value head 0
    params = tree.unflatten(leaves)
    tokens = jnp.asarray(tiny_tokens())
    for importance in (None, measured):
        config, kept = drop_units(CONFIG, params, 95, importance)
        config, kept = drop_heads(config, kept, 1, importance)
        assert config.num_attention_heads == 2
        np.testing.assert_allclose(
            forward(config, kept, tokens), forward(CONFIG, params, tokens), atol=1e-5
        )


# Further training


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_zeros_stay_zero_after_every_step(name):
    """R80: with momentum and decay."""
    params = prune_weights(CONFIG, tiny_params(CONFIG), sparsity=0.5)
    mask = trainable_mask(CONFIG, params, None, method="full")
    section = OptimizerSection(name=name, weight_decay=0.1)
    schedule = make_schedule(ScheduleSection(name="constant"), peak=1e-2, total_steps=10)
    optimizer = make_optimizer(CONFIG, params, mask, section, schedule)
    made = {
        held: make_train_step(
            CONFIG,
            Compute(),
            optimizer=optimizer,
            mask=mask,
            held=zeros_mask(CONFIG, params) if held else None,
        )
        for held in (True, False)
    }
    state = init_state(params, mask=mask, optimizer=optimizer, rng=jax.random.key(0))
    step = jax.jit(made[True])
    paths = prunable(CONFIG)
    for number in range(10):
        state, _ = step(state, random_batch(4, seed=number))
        assert sparsity_of(state.params, paths) == 0.5
        for path in paths:
            before, after = (np.asarray(tree.flatten(t)[path]) for t in (params, state.params))
            assert (after[before == 0] == 0).all() and (after[before != 0] != 0).all()
    moved = tree.flatten(state.params)["norm.weight"] - tree.flatten(params)["norm.weight"]
    assert float(jnp.abs(moved).max()) > 1e-4
    if name == "adamw":
        free = jax.jit(made[False])(
            init_state(params, mask=mask, optimizer=optimizer, rng=jax.random.key(0)),
            random_batch(4, seed=0),
        )
        assert sparsity_of(free[0].params, paths) < 0.01, "without it zeros are lost at once"
        held_norm = step(
            init_state(params, mask=mask, optimizer=optimizer, rng=jax.random.key(0)),
            random_batch(4, seed=0),
        )[1]["grad_norm"]
        assert float(held_norm) < float(free[1]["grad_norm"])


def test_zeros_of_norms_and_biases_are_values_like_any_other():
    held = tree.flatten(zeros_mask(FAMILIES["llama-biases"], tiny_params(FAMILIES["llama-biases"])))
    assert held["layers.mlp.up_proj.weight"] is True
    for path in ("layers.mlp.up_proj.bias", "norm.weight", "embed_tokens.weight"):
        assert held[path] is False


def small_model(folder):
    config = tiny_config(vocab_size=264, eos_token_id=(258,), bos_token_id=None)
    save_hf(folder, config, tiny_params(config), tokenizer=byte_tokenizer())
    return str(folder)


def test_prune_distill_export(tmp_path, capsys):
    """The recipe of docs/pruning.md on a tiny model: masks hold in a run that is resumed."""
    model = small_model(tmp_path / "model")
    code, report, _ = run(
        capsys, "prune", model, tmp_path / "pruned", "--sparsity", "0.5", "--json"
    )
    assert code == 0 and json.loads(report)["sparsity"] == 0.5
    config = run_config(
        tmp_path,
        method="distill",
        model={"name": str(tmp_path / "pruned"), "keep_zeros": True},
        distill={"teacher": model, "soft_weight": 1.0},
        mesh={"cpu_devices": 1},
    )
    train(config, stop_after=3)
    result = train(config)
    pruned = load_hf(tmp_path / "pruned")[1]
    for path in prunable(result.config):
        gone = np.asarray(tree.flatten(pruned)[path]) == 0
        after = np.asarray(tree.flatten(result.params)[path])
        assert (after[gone] == 0).all() and (after[~gone] != 0).all()
    code, _, _ = run(capsys, "export", config.output, tmp_path / "out", "--format", "hf")
    assert code == 0
    exported, params = load_hf(tmp_path / "out")
    assert sparsity_of(params, prunable(exported)) == 0.5


# The command


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_smaller_dense_model_is_a_valid_llama(tmp_path, capsys):
    import torch
    import transformers

    model = small_model(tmp_path / "model")
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"row {i} of some text"} for i in range(6)]
    )
    flags = ["--layers", 1, "--kv-heads", 1, "--units", 40, "--calibration", rows]
    code, text, _ = run(capsys, "prune", model, tmp_path / "out", *flags, "--json")
    assert code == 0
    report = json.loads(text)
    assert len(report["influence"]) == 2 and report["layers"] in ([0], [1])
    assert report["parameters"] < report["parameters_before"] and report["sparsity"] == 0
    config, params = load_hf(tmp_path / "out")
    assert (config.num_hidden_layers, config.num_key_value_heads) == (1, 1)
    assert (config.num_attention_heads, config.intermediate_size) == (2, 40)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokens = tiny_tokens()
    with torch.no_grad():
        expected = reference(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(forward(config, params, jnp.asarray(tokens)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to prune"),
        (("--sparsity", "0.5", "--pattern", "2:4"), "both say how much"),
        (("--sparsity", "1.5"), "sparsity is 1.5"),
        (("--sparsity", "0"), "sparsity is 0"),
        (("--pattern", "2of4"), "not of the form N:M"),
        (("--pattern", "4:4"), "the pattern is 4:4"),
        (("--pattern", "2:7"), "7 does not divide"),
        (("--sparsity", "0.5", "--method", "wanda"), "give --calibration"),
        (("--layers", "1"), "--layers judges by activations"),
        (("--layers", "0"), "--layers judges by activations"),
        (("--units", "40", "--calibration-rows", "9"), "--calibration-rows says how many rows of"),
        (("--units", "500"), "500 units cannot be kept of 96"),
        (("--kv-heads", "0"), "0 key/value heads"),
        (("--units", "40", "--method", "wanda"), "--method is about single weights"),
        (("--sparsity", "0.5", "--skip", "q_porj"), "q_porj"),
    ],
)
def test_flags_are_checked(tmp_path, capsys, flags, message):
    model = small_model(tmp_path / "model")
    code, _, error = run(capsys, "prune", model, tmp_path / "out", *flags)
    assert code == 2 and message in error
    assert not (tmp_path / "out").exists()


def test_quantized_models_and_keep_zeros_elsewhere_are_refused(tmp_path):
    params = quantize(CONFIG, tiny_params(CONFIG), scheme="int8")
    with pytest.raises(ValueError, match="is quantized; only plain weights"):
        prune_weights(CONFIG, params, sparsity=0.5)
    with pytest.raises(ValueError, match="keep_zeros keeps the zeros of a pruned model"):
        run_config(tmp_path, model={"name": "smollm2-135m", "init": "random", "keep_zeros": True})
    with pytest.raises(ValueError, match="keep_zeros is true, but adapters"):
        run_config(tmp_path, model={"name": "smollm2-135m", "keep_zeros": True})
