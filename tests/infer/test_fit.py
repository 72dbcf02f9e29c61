"""A server compiled for TPU slices: what it takes, what its cache can hold, what does not fit."""

import dataclasses
import json

import pytest

from infer.engine.lowering import AbstractEngine, StepShape
from infer.fit.trial import fit
from infer.server.settings import Settings
from llama_jax.cli import main
from llama_jax.commands.fit_serve import show
from llama_jax.mesh.slices import slice_named
from llama_jax.presets import presets
from llama_jax.weights.table import num_parameters

pytest.importorskip("libtpu", reason="the TPU compiler is on Linux x86-64 only")

# Four layers stand for thirty: counts follow from their number.
CONFIG = presets["smollm2-135m"].replace(num_hidden_layers=4)
SMALL = {
    "models": ("smollm2-135m",),
    "architecture": "smollm2-135m",
    "dtype": "bfloat16",
    "max_slots": 8,
    "max_context": 512,
    "piece_tokens": 32,
}


@pytest.fixture(scope="module", autouse=True)
def few_layers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets, "smollm2-135m", CONFIG)
        yield


def fitted(slice="v5e-1", **changes):
    said = []
    result = fit(Settings(**{**SMALL, **changes}), slice_named(slice), said.append)
    assert said
    return result


@pytest.fixture(scope="module")
def small():
    return fitted()


@pytest.mark.slow
def test_every_step_is_compiled_and_what_stays_is_counted(small):
    report = small.to_dict()
    assert report["fits"] and report["missing_bytes_per_chip"] == 0 and report["advice"] == []
    steps = [(step["step"], step["rows"], step["tokens"]) for step in report["steps"]]
    assert steps == [
        ("prefill", 1, 32), ("decode", 2, 4), ("decode", 8, 1), ("sample", 8, 1)
    ]  # fmt: skip
    itemsize = {"bfloat16": 2, "float32": 4}[CONFIG.dtype]
    assert report["weights_bytes_per_chip"] == itemsize * num_parameters(CONFIG)
    # Three heads are filled up to four of 128 numbers; beside eight full rows of 16 blocks there
    # are nobody's page and two for trying steps out.
    page = CONFIG.num_hidden_layers * 32 * (2 * 4) * 128 * 2
    assert report["cache_bytes_per_chip"] == pytest.approx((8 * 16 + 1 + 2) * page, abs=8)
    assert (report["cache_tokens"], report["row_tokens"]) == (8 * 512, 512)
    parts = ("weights", "cache", "sampling", "transient", "code")
    together = sum(report[f"{name}_bytes_per_chip"] for name in parts)
    assert report["hbm_bytes_per_chip"] == pytest.approx(together, rel=0.02)


def test_the_largest_cache_leaves_no_room_for_another_percent(small):
    report = small.to_dict()
    page = CONFIG.num_hidden_layers * 32 * (2 * 4) * 128 * 2
    more = report["largest_cache_tokens"] - report["cache_tokens"]
    free = report["hbm_limit"] - report["hbm_bytes_per_chip"]
    assert 0.98 * free < more // 32 * page <= free
    assert report["largest_slots_of_max_context"] == report["largest_cache_tokens"] // 512
    assert report["largest_context_of_max_slots"] == 512


def test_work_and_bounds_of_a_step_of_all_rows(small):
    report = small.to_dict()
    layers, heads = CONFIG.num_hidden_layers, CONFIG.num_attention_heads * CONFIG.head_dim
    norms = (2 * layers + 1) * CONFIG.hidden_size
    products = num_parameters(CONFIG) - norms  # the embedding is the head as well
    wanted = 8 * (2 * products + 4 * layers * heads * 512)
    assert report["flops_per_step"] == pytest.approx(wanted, rel=1e-3)
    cache = 8 * 512 * layers * (2 * 4) * 128 * 2
    least = report["weights_bytes_per_chip"] + cache
    # The compiler turns the embedding around for the head: it is read and written once more.
    embedding = CONFIG.vocab_size * CONFIG.hidden_size * 2
    assert least < report["bytes_accessed_per_chip"] < least + 4 * embedding
    assert report["collectives"] == {}
    assert report["bound_by"] == "memory"
    seconds = report["bytes_accessed_per_chip"] / 819e9
    assert report["bound_tokens_per_second"] == pytest.approx(8 / seconds)


@pytest.mark.slow
def test_keys_and_values_in_int8_lie_in_less_and_are_never_copied(small, monkeypatch):
    decode = [StepShape("decode", 2, 4), StepShape("decode", 8, 1)]  # sampling reads no cache
    monkeypatch.setattr(AbstractEngine, "all", lambda engine: decode)
    monkeypatch.setattr(AbstractEngine, "largest", lambda engine: decode[1:])
    report = fitted(cache_dtype="int8", block_size=128, piece_tokens=128).to_dict()
    layers, heads = CONFIG.num_hidden_layers, 2 * CONFIG.num_key_value_heads
    # A number a byte, in registers of 128, and a float32 for each head, of eight rather than six.
    # Beside the rows are nobody's page and two for trying steps out.
    tokens = 8 * 512 + 3 * 128
    cache = layers * tokens * (heads * 128 + 8 * 4)
    assert report["cache_bytes_per_chip"] == pytest.approx(cache, abs=8)
    assert report["largest_cache_tokens"] > 2.5 * small.to_dict()["largest_cache_tokens"]
    for mine, other in zip(report["steps"], small.to_dict()["steps"][1:3], strict=True):
        assert (mine["rows"], mine["tokens"]) == (other["rows"], other["tokens"])
        more = mine["temporaries_bytes_per_chip"] - other["temporaries_bytes_per_chip"]
        assert more < cache / 10
    # What the steps read of it, one kernel in each layer: eight full rows.
    floats = small.to_dict()["bytes_accessed_per_chip"] - layers * 8 * 512 * (2 * 4) * 128 * 2
    integers = report["bytes_accessed_per_chip"] - layers * 8 * 512 * (heads * 128 + 8 * 4)
    assert integers == pytest.approx(floats, rel=0.02)


@pytest.mark.slow
def test_adapters_and_what_they_compute_are_counted(small, monkeypatch):
    decode = [StepShape("decode", 8, 1)]
    monkeypatch.setattr(AbstractEngine, "all", lambda engine: decode)
    monkeypatch.setattr(AbstractEngine, "largest", lambda engine: decode)
    result = fitted(max_adapters=4, max_lora_rank=8)
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    queries = CONFIG.num_attention_heads * CONFIG.head_dim
    keys = CONFIG.num_key_value_heads * CONFIG.head_dim
    # In and out of q, k, v and o, of gate, up and down.
    sides = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    numbers = CONFIG.num_hidden_layers * 4 * 8 * sides
    assert result.adapters == 2 * numbers
    assert result.weights == small.weights
    assert result.decode.flops - small.decode.flops == 8 * 2 * numbers
    # The step reads one set of them; when they are exchanged there is a second.
    mine, other = (each.decode.compiled.memory.arguments for each in (result, small))
    assert 2 * numbers < mine - other < 1.1 * 2 * numbers
    assert result.device_bytes > mine + result.adapters
    crowded = dataclasses.replace(result, memory=2**34)
    assert any("max_lora_rank" in line for line in crowded.to_dict()["advice"])


@pytest.mark.slow
def test_a_draft_model_its_slots_and_its_steps_are_counted(monkeypatch):
    config = CONFIG.replace(vocab_size=1024, num_hidden_layers=2)
    monkeypatch.setitem(presets, "smollm2-135m", config)
    decode = [StepShape("decode", 8, 1)]
    monkeypatch.setattr(AbstractEngine, "all", lambda engine: [*decode, *engine.draft.all()])
    monkeypatch.setattr(AbstractEngine, "largest", lambda engine: decode)
    result = fitted(draft_model="small", draft_architecture="smollm2-135m", draft_tokens=3)
    drafting = [step for step in result.steps if step.shape.is_drafting]
    assert [step.shape for step in drafting] == [
        StepShape("draft prefill", 1, 32), StepShape("draft", 2, 3)
    ]  # fmt: skip
    # Slots of two rows and one, of 512 tokens and a padded piece in whole tiles.
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    slots = 3 * (3 * 256) * layers * 2 * heads * config.head_dim * 2
    assert result.draft == 2 * num_parameters(config) + slots
    # Each row reads two tokens and guesses from the second, then reads two guesses more.
    queries = config.num_attention_heads * config.head_dim
    head = config.vocab_size * config.hidden_size
    norms = (2 * layers + 1) * config.hidden_size
    products = num_parameters(config) - norms - head
    wanted = 2 * 4 * (2 * products + 4 * layers * queries * 512) + 2 * 3 * 2 * head
    assert drafting[-1].flops == pytest.approx(wanted, rel=1e-3)
    own = max(s.compiled.memory.arguments for s in result.steps if not s.shape.is_drafting)
    assert result.device_bytes > own + result.draft
    crowded = dataclasses.replace(result, memory=2**34)
    assert any("draft_model" in line for line in crowded.to_dict()["advice"])


@pytest.mark.slow
def test_several_hosts_have_adapters_and_a_draft_model(monkeypatch):
    large = presets["llama3.2-1b"].replace(num_hidden_layers=2)
    monkeypatch.setitem(presets, "llama3.2-1b", large)
    draft = large.replace(num_hidden_layers=1)
    monkeypatch.setitem(presets, "smollm2-135m", draft)
    decode = [StepShape("decode", 8, 1)]
    monkeypatch.setattr(AbstractEngine, "all", lambda engine: [*decode, *engine.draft.all()[-1:]])
    monkeypatch.setattr(AbstractEngine, "largest", lambda engine: decode)
    changes = {"models": ("m",), "architecture": "llama3.2-1b", "mesh": "tensor=8,fsdp=2"}
    more = {"draft_model": "d", "draft_architecture": "smollm2-135m", "draft_tokens": 2}
    result = fitted("v5e-16", **changes, **more, max_adapters=2)
    report = result.to_dict()
    # A part of the adapters, and the whole of the draft model.
    assert report["fits"] and result.draft > 2 * num_parameters(draft)
    assert 0 < result.adapters < result.draft


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    changes = {"models": ("llama3.1-8b",), "architecture": "llama3.1-8b", "max_context": 8192}
    report = fitted(**changes, max_slots=2).to_dict()
    assert not report["fits"] and report["largest_cache_tokens"] == 0
    assert 0 < report["missing_bytes_per_chip"] < 2**30
    advice = " ".join(report["advice"])
    assert "not even one row" in advice
    for wanted in ("quantization=int8", "cache_dtype=int8", "v5e-4"):
        assert wanted in advice


def test_a_cache_that_is_too_large_is_told_what_would_fit(small):
    crowded = dataclasses.replace(small, memory=2**34)
    assert not crowded.fits
    tokens = small.largest_blocks * 32
    (first, *_) = crowded.to_dict()["advice"]
    assert first.startswith(f"cache_tokens={tokens} fits, which is max_slots={tokens // 512} of")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh": "tensor=4"}, "v5e-1 has 1 devices"),
        ({"models": ("a", "b")}, "one model at a time"),
        ({"architecture": "smollm2"}, "architecture is 'smollm2'"),
        (
            {"draft_model": "small", "draft_architecture": "llama3.2-1b", "draft_tokens": 3},
            "128256 ids and the model 49152",
        ),
        (
            {"draft_model": "small", "draft_architecture": "llama", "draft_tokens": 3},
            "draft_architecture is 'llama'; it must be one of",
        ),
        ({"draft_architecture": "llama3.2-1b"}, "there is no draft_model"),
        ({"quantization": "int3"}, "scheme is 'int3'"),
        ({"cache_dtype": "int8"}, "block_size is 32; .* a multiple of 128"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        fit(Settings(**{**SMALL, **changes}), slice_named("v5e-1"), print)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        fit(Settings(**{**SMALL, "mesh": "tensor=4"}), slice_named("v5e-4"), print)


def test_a_context_that_the_model_was_not_made_for_is_refused():
    with pytest.raises(ValueError, match="max_context is 8193, but the model was made for 8192"):
        fit(Settings(**{**SMALL, "max_context": 8193}), slice_named("v5e-1"), print)


@pytest.mark.slow
def test_the_command_reports_each_slice(tmp_path, capsys):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "models: [smollm2-135m]\narchitecture: smollm2-135m\nslice: v5e-1\ndtype: bfloat16\n"
        "max_slots: 2\nmax_context: 64\npiece_tokens: 32\n"
    )
    assert main(["fit", "--serve", str(path), "max_context=96", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["slice"], report["max_context"], report["fits"]) == ("v5e-1", 96, True)
    show([report])
    shown = capsys.readouterr().out
    assert "tokens that a cache can hold" in shown and "decode" in shown
    assert main(["fit", "--serve", str(path), "max_contxt=96"]) == 2
    assert main(["fit", "--serve", str(path), "--search"]) == 2
    assert "--serve finds what fits" in capsys.readouterr().err
