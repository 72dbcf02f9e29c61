"""Adapter folders mean the same to PEFT and to us, and what does not fit is refused by name."""

import json
import re
import warnings

import jax
import numpy as np
import pytest
import torch

from llama_jax import tree
from llama_jax.formats.peft import adapter_vocab_size, load_adapter, save_adapter
from llama_jax.formats.safetensors import SafetensorsFile, write_arrays
from llama_jax.model import transformer
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.lora import add_lora, merge_lora, remove_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import quantize
from llama_jax.weights.vocabulary import untie_embeddings
from tests.adapters import trained
from tests.reference import reference_logits, reference_model
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

# PEFT warns about many things of its own; what matters here is compared.
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = tiny_tokens(2, 9)
CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
Q_PROJ = "layers.self_attn.q_proj.weight"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def forward(config, params):
    return np.asarray(transformer.forward(config, params, TOKENS))


def peft_adapter(folder, config, params, *, vocab=None, **options):
    """An adapter that PEFT made and "trained"; returns its logits."""
    model = reference_model(config, params)
    torch.manual_seed(0)
    if vocab is not None:
        model.resize_token_embeddings(vocab)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.eval().save_pretrained(folder, save_embedding_layers=True if vocab else "auto")
    return reference_logits(wrapped, TOKENS)


def edit(folder, **fields):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def arrays(folder):
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    return {name: np.array(file.view(name)) for name in file.header.tensors}


def settings(folder):
    return json.loads((folder / CONFIG_FILE).read_text())


TIED = {"ensure_weight_tying": True}
CASES = {
    "all-linear": ("llama-gqa", {"target_modules": "all-linear"}),
    "everything": (
        "llama-biases",
        {
            "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["embed_tokens", "lm_head", "norm"],
            "use_rslora": True,
            # A name that is not in this model, or has no adapter, means nothing, as in PEFT.
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "c_attn": 9, "up_proj": 9},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "embeddings": ("llama-gqa", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "regex": ("mistral", {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"}),
    "layers": ("llama-gqa", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    # As do a name that is in none of the layers, and one that leaves out nothing.
    "idle": (
        "llama-gqa",
        {
            "target_modules": ["q_proj", "embed_tokens"],
            "exclude_modules": ["up_proj"],
            "layers_to_transform": [1],
        },
    ),
    "idle-regex": (
        "llama-gqa",
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.up_proj"},
    ),
    "tied": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"], **TIED}),
    "tied-saved": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], **TIED},
    ),
    "untied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "experts": ("mixtral", {"target_modules": "all-linear"}),
    "gate-up": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_ways_with_peft(case, tmp_path):
    """R53, R54: PEFT's adapter here, and the same adapter written here in PEFT."""
    family, options = CASES[case]
    config = FAMILIES[family]
    params = tiny_params(config)
    expected = peft_adapter(tmp_path / "theirs", config, params, **options)
    if case == "untied":
        config, params = untie_embeddings(config, params)
    loaded = load_adapter(tmp_path / "theirs", config, params)
    got = forward(config, loaded)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(got - forward(config, params)).max() > 0.01
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, remove_lora(loaded), params))

    save_adapter(tmp_path / "ours", config, loaded, base_model_name_or_path="tiny")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(reference_model(config, params), tmp_path / "ours")
    assert not [w for w in told if "missing adapter keys" in str(w.message)]
    np.testing.assert_allclose(reference_logits(theirs.eval(), TOKENS), got, atol=1e-5)
    if not config.tie_word_embeddings:  # PEFT itself loses tied names in a second adapter
        report = theirs.load_adapter(str(tmp_path / "ours"), adapter_name="again")
        assert not report.unexpected_keys
        assert not [key for key in report.missing_keys if "again" in key]
    assert settings(tmp_path / "ours")["use_rslora"] == bool(options.get("use_rslora"))
    again = load_adapter(tmp_path / "ours", config, params)
    for before, after in zip(jax.tree.leaves(loaded), jax.tree.leaves(again), strict=True):
        # Experts and their router are written with one rank: the smaller are filled up with zeros.
        more = [(0, b - a) for a, b in zip(before.shape, after.shape, strict=True)]
        assert case == "experts" or before.shape == after.shape
        np.testing.assert_array_equal(after, np.pad(before, more) if more else before)
    # Newer XLA takes a sum over more zeros in another order.
    tolerance = 2e-6 if case == "experts" and jax.__version_info__ >= (0, 11) else 0
    np.testing.assert_allclose(forward(config, again), got, rtol=0, atol=tolerance)


def test_names_shapes_and_settings_of_an_export(tmp_path):
    """R54: the key, [r, in] and [out, r]; settings are short."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",), layers_to_transform=(0,))
    params = trained(CONFIG, add_lora(CONFIG, PARAMS, lora, jax.random.key(0)))
    files = save_adapter(tmp_path / "a", CONFIG, params, base_model_name_or_path="org/base")
    assert sorted(path.name for path in files) == sorted(p.name for p in (tmp_path / "a").iterdir())
    tensors = arrays(tmp_path / "a")
    assert {name: t.shape for name, t in tensors.items()} == {
        f"{FIRST}.lora_A.weight": (4, 64),
        f"{FIRST}.lora_B.weight": (64, 4),
    }
    leaf = tree.flatten(params)[Q_PROJ]
    np.testing.assert_array_equal(tensors[f"{FIRST}.lora_A.weight"], leaf.lora_a[0])
    written = settings(tmp_path / "a")
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (4, 8, "LORA")
    assert written["base_model_name_or_path"] == "org/base"
    assert written["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    with pytest.raises(ValueError, match="not empty"):
        save_adapter(tmp_path / "a", CONFIG, params, base_model_name_or_path=None)
    save_adapter(tmp_path / "a", CONFIG, params, base_model_name_or_path=None, overwrite=True)
    assert settings(tmp_path / "a")["base_model_name_or_path"] is None


def test_dtypes_are_kept_in_files_and_chosen_on_loading(tmp_path):
    lora = LoraConfig(r=2, target_modules=("q_proj",))
    half = add_lora(CONFIG, PARAMS, lora, jax.random.key(0), param_dtype="bfloat16")
    save_adapter(tmp_path / "a", CONFIG, half, base_model_name_or_path=None)
    assert {str(t.dtype) for t in arrays(tmp_path / "a").values()} == {"bfloat16"}
    for dtype in ("float32", "bfloat16"):
        back = load_adapter(tmp_path / "a", CONFIG, PARAMS, param_dtype=dtype)
        leaf = tree.flatten(back)[Q_PROJ]
        assert leaf.lora_a.dtype == dtype
        expected = tree.flatten(half)[Q_PROJ].lora_a.astype(dtype)
        np.testing.assert_array_equal(leaf.lora_a, expected)


@pytest.fixture
def folder(tmp_path):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",))
    params = trained(CONFIG, add_lora(CONFIG, PARAMS, lora, jax.random.key(0)))
    save_adapter(tmp_path / "a", CONFIG, params, base_model_name_or_path=None)
    return tmp_path / "a"


def refused(folder, *messages, config=CONFIG, params=PARAMS, **options):
    with pytest.raises(ValueError) as error:
        load_adapter(folder, config, params, **options)
    for message in messages:
        assert message in str(error.value), str(error.value)


def test_tensors_that_do_not_match_are_listed(folder):
    """R55: names without "model.", modules the base lacks, a tensor too many or too few."""
    good = arrays(folder)
    a, b = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"

    def refuse(changed, *messages):
        write_arrays(folder / WEIGHTS_FILE, changed)
        refused(folder, *messages)

    short = {name.replace("model.model.model.", "model.model."): t for name, t in good.items()}
    refuse(short, *short)
    bare = {name.removeprefix("base_model.model."): t for name, t in good.items()}
    refuse(bare, "lack the prefix", *bare)
    foreign = {name.replace("q_proj", "query"): t for name, t in good.items()}
    refuse(foreign, "belong to no module", *foreign)
    more = {name.replace("q_proj", "k_proj"): t for name, t in good.items()}
    refuse({**good, **more}, "configuration does not cover", *more)
    deep = {name.replace("layers.1.", "layers.2."): t for name, t in good.items()}
    refuse(deep, "belong to no module", "layers.2.self_attn")
    refuse({name: t for name, t in good.items() if name != a}, "the file lacks", a)
    refuse({**good, b: good[b].T.copy()}, b, "(2, 64)", "(64, 2)")
    refuse({**good, a: good[a][:1]}, a, "(1, 64)", "(2, 64)")
    write_arrays(folder / WEIGHTS_FILE, good)
    edit(folder, target_modules=["q_proj", "v_proj"])
    refused(folder, "the file lacks", "v_proj.lora_A.weight")
    edit(folder, target_modules=["query"])
    refused(folder, "name no module of this model")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("layers_pattern", "blocks"),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("use_qalora", True),
        ("megatron_config", {"hidden": 1}),
        ("a_field_of_the_future", 3),
    ],
)
def test_other_methods_are_refused_by_name(folder, field, value):
    edit(folder, **{field: value})
    refused(folder, field, repr(value))


def test_fields_that_change_nothing_are_accepted(folder):
    expected = load_adapter(folder, CONFIG, PARAMS)
    edit(
        folder,
        lora_dropout=0.1,
        inference_mode=False,
        init_lora_weights="gaussian",
        layers_pattern="layers",
        layers_to_transform=[0, 1],
        target_modules=["q_proj", "a_module_of_another_model"],
        a_field_of_the_future=None,
        another=[],
        task_type=None,
    )
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, CONFIG, PARAMS), expected)


def test_settings_that_are_no_adapter(folder):
    edit(folder, peft_type="IA3")
    refused(folder, "peft_type is 'IA3'")
    edit(folder, peft_type="LORA", r=None)
    refused(folder, "r is missing")
    edit(folder, r=0)
    refused(folder, str(folder), "a rank is a positive integer")
    edit(folder, r=4, layers_to_transform=[7])
    refused(folder, str(folder), "lora.layers_to_transform holds 7")
    edit(folder, layers_to_transform=None)
    edit(folder, use_dora=0)
    refused(folder, "use_dora is 0; it must be false")
    edit(folder, use_dora=False, fan_in_fan_out=0)
    refused(folder, "fan_in_fan_out is 0; it must be false")
    edit(folder, fan_in_fan_out=False, bias=False)
    refused(folder, "bias is False; it must be 'none'")
    edit(folder, bias="none")
    edit(folder, r=4, rank_pattern=[])
    refused(folder, "give a mapping")
    edit(folder, rank_pattern={}, modules_to_save=[5])
    refused(folder, "module names are strings")
    (folder / CONFIG_FILE).write_text("{")
    refused(folder, "not valid JSON")
    (folder / CONFIG_FILE).unlink()
    refused(folder, "not a PEFT adapter")


def test_integers_are_no_factors(folder):
    path = folder / WEIGHTS_FILE
    file = SafetensorsFile(path)
    tensors = {name: np.array(file.view(name)) for name in file.header.tensors}
    name = min(tensors)
    write_arrays(path, {**tensors, name: tensors[name].astype(np.int8)})
    refused(folder, name, "is int8; allowed are float32")


def test_pickles_are_not_opened(folder):
    """R111: the file would run code if it were."""
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    load_adapter(folder, CONFIG, PARAMS)
    (folder / WEIGHTS_FILE).unlink()
    refused(folder, "adapter_model.bin", "pickle")
    (folder / "adapter_model.bin").unlink()
    refused(folder, "holds no adapter_model.safetensors")


def test_a_second_adapter_needs_to_be_asked_for(folder):
    once = load_adapter(folder, CONFIG, PARAMS)
    refused(folder, "has an adapter already", params=once)
    twice = load_adapter(folder, CONFIG, once, on_top=True)
    base = np.asarray(tree.flatten(PARAMS)[Q_PROJ])
    one, two = (np.asarray(tree.flatten(merge_lora(p))[Q_PROJ]) for p in (once, twice))
    np.testing.assert_allclose(two - base, 2 * (one - base), atol=1e-6)
    with pytest.raises(ValueError, match="two adapters"):
        save_adapter(folder.parent / "b", CONFIG, twice, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="hold no adapter"):
        save_adapter(folder.parent / "b", CONFIG, PARAMS, base_model_name_or_path=None)
    assert not (folder.parent / "b").exists()


def test_on_a_quantized_base(folder):
    base = quantize(CONFIG, PARAMS, scheme="nf4")
    leaf = tree.flatten(load_adapter(folder, CONFIG, base))[Q_PROJ]
    assert leaf.base is tree.flatten(base)[Q_PROJ]
    plain = tree.flatten(load_adapter(folder, CONFIG, PARAMS))[Q_PROJ]
    np.testing.assert_array_equal(leaf.lora_a, plain.lora_a)


@pytest.mark.parametrize("saved", [False, True])
def test_a_larger_vocabulary_needs_to_be_asked_for(tmp_path, saved):
    """R59: both sizes are named; with the resize, old rows of the base are unchanged."""
    options = {"modules_to_save": ["embed_tokens", "lm_head"]} if saved else {}
    expected = peft_adapter(
        tmp_path / "a", CONFIG, PARAMS, vocab=132, target_modules=["q_proj"], **options
    )
    refused(tmp_path / "a", "132 rows", "128 rows", "resize=True")
    assert adapter_vocab_size(tmp_path / "a", CONFIG) == 132
    params = load_adapter(tmp_path / "a", CONFIG, PARAMS, resize=True)
    larger = CONFIG.replace(vocab_size=132)
    np.testing.assert_allclose(forward(larger, params), expected, atol=1e-5)
    leaf, base = params["embed_tokens"]["weight"], remove_lora(params)
    assert isinstance(leaf, SavedTensor) == saved
    assert base["lm_head"]["weight"].shape == (132, 64)
    for name in ("embed_tokens", "lm_head"):
        np.testing.assert_array_equal(base[name]["weight"][:128], PARAMS[name]["weight"])
    smaller = tiny_config(vocab_size=140)
    refused(
        tmp_path / "a", "132 rows", "140 rows",
        config=smaller, params=tiny_params(smaller), resize=True,
    )  # fmt: skip


def test_stored_embeddings_must_be_those_of_the_base(tmp_path):
    peft_adapter(tmp_path / "a", CONFIG, PARAMS, target_modules=["embed_tokens"])
    leaf = load_adapter(tmp_path / "a", CONFIG, PARAMS)["embed_tokens"]["weight"]
    assert isinstance(leaf, LoraTensor)
    assert leaf.base is PARAMS["embed_tokens"]["weight"]
    refused(tmp_path / "a", "trained on other base", params=tiny_params(CONFIG, seed=1))


def test_tied_halves_must_agree(tmp_path):
    config = FAMILIES["llama-tied"]
    params = tiny_params(config)
    lora = LoraConfig(target_modules=("embed_tokens",), ensure_weight_tying=True)
    adapted = trained(config, add_lora(config, params, lora, jax.random.key(0)))
    save_adapter(tmp_path / "a", config, adapted, base_model_name_or_path=None)
    changed = arrays(tmp_path / "a")
    changed["base_model.model.lm_head.lora_A.weight"] += 1
    write_arrays(tmp_path / "a" / WEIGHTS_FILE, changed)
    refused(tmp_path / "a", "lm_head.lora_A", "untie", config=config, params=params)
    edit(tmp_path / "a", ensure_weight_tying=False)
    refused(tmp_path / "a", "ensure_weight_tying", config=config, params=params)


def test_adapters_on_experts(tmp_path):
    """PEFT fuses w1 with w3 on reading; written again by it, they come back apart and equal."""
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=("w1", "w2", "w3", "gate", "q_proj"))
    adapted = trained(config, add_lora(config, params, lora, jax.random.key(0)))
    save_adapter(tmp_path / "a", config, adapted, base_model_name_or_path=None)
    assert "base_model.model.model.layers.0.block_sparse_moe.experts.3.w1.lora_A.weight" in arrays(
        tmp_path / "a"
    )
    theirs = peft.PeftModel.from_pretrained(reference_model(config, params), tmp_path / "a").eval()
    expected = reference_logits(theirs, TOKENS)
    np.testing.assert_allclose(forward(config, adapted), expected, atol=1e-5)
    theirs.save_pretrained(tmp_path / "b")
    assert settings(tmp_path / "b")["target_parameters"]
    jax.tree.map(
        np.testing.assert_array_equal, load_adapter(tmp_path / "b", config, params), adapted
    )


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 3}},
        {"rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 5}},
        {"rank_pattern": {r".*\.0\.mlp\.gate\.weight": 2}, "alpha_pattern": {"gate.weight": 3}},
        {"rank_pattern": {r"layers\.0\.mlp\.experts\.(gate_up|down)_proj": 2}, "use_rslora": True},
    ],
)
def test_parameters_have_the_rank_and_alpha_of_their_layer(tmp_path, patterns):
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    options = {"target_modules": ["q_proj"], "target_parameters": names, **patterns}
    expected = peft_adapter(tmp_path / "a", config, params, **options)
    got = forward(config, load_adapter(tmp_path / "a", config, params))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_parameters_of_another_rank_than_the_settings_say_are_refused(tmp_path):
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    peft_adapter(tmp_path / "a", config, params, **options)
    edit(tmp_path / "a", rank_pattern={r"layers\.1\..*down_proj": 6})
    message = "model.layers.1.mlp.experts.down_proj has rank 2, but r and rank_pattern make it 6"
    refused(tmp_path / "a", str(tmp_path / "a"), message, config=config, params=params)


def test_a_list_of_layers_is_not_about_parameters(tmp_path):
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    expected = peft_adapter(
        tmp_path / "a",
        config,
        params,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.down_proj"],
        layers_to_transform=[1],
    )
    got = forward(config, load_adapter(tmp_path / "a", config, params))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_parameters": 5}, "target_parameters is 5; give a list of parameter names"),
        ({"target_parameters": [5]}, "target_parameters is [5]; give a list"),
        ({"target_parameters": [None]}, "target_parameters is [None]; give a list"),
        (
            {"target_parameters": ["mlp.experts.down_proj"], "target_modules": 5},
            "beside target_modules 5 cannot be read",
        ),
        (
            {"target_parameters": ["mlp.experts.down_proj"]},
            "mlp.experts.lora_A.weight by its target_parameters, but lacks it",
        ),
    ],
)
def test_settings_of_experts_that_mean_nothing(folder, fields, message):
    config = FAMILIES["mixtral"]
    edit(folder, **fields)
    refused(folder, str(folder), message, config=config, params=tiny_params(config))


@pytest.mark.parametrize("modules", [("w1", "w3"), ("w1", "w3", "gate", "q_proj")])
def test_adapters_on_w1_and_w3_alone_are_written_fused(tmp_path, modules):
    """PEFT places a pair for each expert's w1 and w3 inside w2's, and finds nothing without it."""
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=modules)
    adapted = trained(config, add_lora(config, params, lora, jax.random.key(0)))
    save_adapter(tmp_path / "a", config, adapted, base_model_name_or_path=None)
    assert settings(tmp_path / "a")["target_parameters"] == ["mlp.experts.gate_up_proj"]
    theirs = peft.PeftModel.from_pretrained(reference_model(config, params), tmp_path / "a").eval()
    expected = reference_logits(theirs, TOKENS)
    np.testing.assert_allclose(forward(config, adapted), expected, atol=1e-5)
    again = load_adapter(tmp_path / "a", config, params)
    jax.tree.map(np.testing.assert_array_equal, again, adapted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("w1", "q_proj")}, "needs both"),
        ({"target_modules": ("w1", "w2", "w3"), "layers_to_transform": (1,)}, "all layers"),
        ({"target_modules": ("w1", "w2", "w3"), "alpha_pattern": {"w2": 3}}, "one scale"),
        ({"target_modules": ("w2",), "use_rslora": True}, "rsLoRA"),
    ],
)
def test_adapters_on_experts_that_peft_cannot_read(tmp_path, options, message):
    config = FAMILIES["mixtral"]
    shapes = add_lora(config, tiny_params(config), LoraConfig(**options), jax.random.key(0))
    with pytest.raises(ValueError, match=re.escape(message)):
        save_adapter(tmp_path / "a", config, shapes, base_model_name_or_path=None)
