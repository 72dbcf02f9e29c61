"""Generation against transformers, alone against in a batch, whole against streamed."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import torch

from infer import steps
from infer.buckets import row_bucket, token_bucket
from infer.completion import Row
from infer.generate import Generator, generate
from infer.params import SamplingParams
from infer.stop import StopMatcher
from llama_jax import tree
from llama_jax.config import RopeScaling
from llama_jax.formats.peft import save_adapter
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.model import transformer
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from tests.infer.scripted import scripted_model, scripted_params, word_tokenizer
from tests.reference import reference_model
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def prompts_of(*lengths):
    return [row[:n].tolist() for row, n in zip(tiny_tokens(len(lengths), 64), lengths, strict=True)]


@pytest.fixture(scope="module")
def tiny():
    config = FAMILIES["llama-gqa"].replace(eos_token_id=())
    return config, tiny_params(config), None


# The model's own continuation


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "mixtral"])
def test_greedy_equals_transformers(family):
    config = FAMILIES[family]
    params = tiny_params(config)
    prompt = prompts_of(11)[0]
    model = reference_model(config, params)
    wanted = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 11).long(),
        do_sample=False, max_new_tokens=20, pad_token_id=0,
    )[0, 11:].tolist()  # fmt: skip
    got = generate((config, params, None), [prompt], GREEDY)[0]
    assert got.token_ids == wanted
    assert got.finish_reason == ("stop" if wanted[-1] in config.eos_token_id else "length")


def test_prefill_and_decode_equal_one_full_pass(tiny):
    config, params, _ = tiny
    prompt = prompts_of(9)[0]
    got = generate(tiny, [prompt], GREEDY.replace(logprobs=5))[0]
    whole = np.array([prompt + got.token_ids])
    logprobs = jax.nn.log_softmax(transformer.forward(config, params, whole))[0]
    for place, entry in enumerate(got.logprobs, start=len(prompt) - 1):
        assert entry.token_id == int(logprobs[place].argmax())
        np.testing.assert_allclose(entry.logprob, logprobs[place, entry.token_id], atol=1e-5)
        for alternative in entry.top:
            wanted = logprobs[place, alternative.token_id]
            np.testing.assert_allclose(alternative.logprob, wanted, atol=1e-5)


def test_a_row_in_a_padded_batch_equals_the_row_alone(tiny):  # R44
    prompts = prompts_of(3, 8, 40)
    wishes = GREEDY.replace(logprobs=20)
    batch = generate(tiny, prompts, wishes)
    assert [output.prompt_token_ids for output in batch] == prompts
    for prompt, together in zip(prompts, batch, strict=True):
        alone = generate(tiny, [prompt], wishes)[0]
        assert alone.token_ids == together.token_ids
        for a, b in zip(alone.logprobs, together.logprobs, strict=True):
            wanted = [each.logprob for each in a.top]
            np.testing.assert_allclose([each.logprob for each in b.top], wanted, atol=1e-5)


def test_padding_does_not_lengthen_dynamic_rope(monkeypatch):  # R44
    monkeypatch.setattr("infer.batch.PREFILL_TOKENS", 16)
    scaling = RopeScaling(rope_type="dynamic", factor=2.0, original_max_position_embeddings=8)
    config = tiny_config(rope_scaling=scaling, eos_token_id=())
    params = tiny_params(config)
    short, long = prompts_of(20, 40)
    wishes = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    together = generate((config, params, None), [short, long], wishes)
    for prompt, output in zip((short, long), together, strict=True):
        wanted = jax.nn.log_softmax(transformer.forward(config, params, np.array([prompt])))[0, -1]
        got = {each.token_id: each.logprob for each in output.logprobs[0].top}
        np.testing.assert_allclose(list(got.values()), wanted[np.array(list(got))], atol=1e-5)


def test_a_long_prompt_runs_in_pieces(tiny, monkeypatch):
    prompts = prompts_of(5, 50)
    wishes = GREEDY.replace(logprobs=0, echo=True)
    whole = generate(tiny, prompts, wishes)
    monkeypatch.setattr("infer.batch.PREFILL_TOKENS", 16)
    pieces = generate(tiny, prompts, wishes)
    for a, b in zip(whole, pieces, strict=True):
        assert a.token_ids == b.token_ids
        got = [each.logprob for each in b.prompt_logprobs[1:]]
        wanted = [each.logprob for each in a.prompt_logprobs[1:]]
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_layers_scanned_unrolled_and_sharded_agree(tiny):
    config, params, _ = tiny
    prompts = prompts_of(3, 8, 20)
    wishes = SamplingParams(seed=5, max_tokens=8, top_p=0.9)
    wanted = [output.token_ids for output in generate(tiny, prompts, wishes, layers="unrolled")]
    scanned = generate(tiny, prompts, wishes, layers="scanned")
    assert [output.token_ids for output in scanned] == wanted
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, shardings(config, params, mesh))
    sharded = generate((config, placed, None), prompts, wishes, mesh=mesh)
    assert [output.token_ids for output in sharded] == wanted
    with pytest.raises(ValueError, match="layers is 'both'"):
        generate(tiny, prompts, wishes, layers="both")


# Compilation


def test_new_lengths_and_parameters_compile_nothing(tiny):
    config, params, _ = tiny
    generator = Generator(config, params)
    rng = np.random.default_rng(0)

    def run(lengths):
        wishes = [
            SamplingParams(
                temperature=float(rng.uniform(0.1, 2)), top_p=float(rng.uniform()), max_tokens=9
            )
            for _ in lengths
        ]
        generator.generate(prompts_of(*lengths), wishes)

    run([9, 16, 12])
    counts = [f._cache_size() for f in (steps.prefill, steps.first_token, steps.next_token)]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    for lengths in ([1, 2, 3, 4], [16, 5, 7], [11, 3, 13, 2]):
        run(lengths)
    assert compiled == []
    after = [f._cache_size() for f in (steps.prefill, steps.first_token, steps.next_token)]
    assert after == counts


def test_buckets():
    assert [token_bucket(n) for n in (1, 16, 17, 33, 65, 97, 128, 129, 193, 8192)] == [
        16, 16, 32, 64, 96, 128, 128, 192, 256, 8192,
    ]  # fmt: skip
    assert [row_bucket(n) for n in (1, 2, 3, 5, 7, 9, 13, 32)] == [1, 2, 4, 6, 8, 12, 16, 32]
    assert row_bucket(5, multiple_of=4) == 8
    assert all(token_bucket(n) % steps.SCORED_POSITIONS == 0 for n in range(1, 5000))


# Seeds and choices


def test_seeds_choose_the_text_and_neighbours_do_not(tiny):  # R89, R90
    prompt, other = prompts_of(6, 30)
    seeded = SamplingParams(seed=7, max_tokens=12)
    alone = generate(tiny, [prompt], seeded)[0]
    pair = generate(tiny, [other, prompt], [SamplingParams(max_tokens=15), seeded])
    assert pair[1].token_ids == alone.token_ids
    four = generate(tiny, [prompt], seeded.replace(n=4))
    assert [output.index for output in four] == [0, 1, 2, 3]
    assert four[0].token_ids == alone.token_ids
    texts = [tuple(output.token_ids) for output in four]
    assert len(set(texts)) == 4
    again = generate(tiny, [prompt], seeded.replace(n=4), batch_size=3)
    assert [tuple(output.token_ids) for output in again] == texts
    unseeded = SamplingParams(max_tokens=12)
    assert generate(tiny, [prompt], unseeded)[0].token_ids != (
        generate(tiny, [prompt], unseeded)[0].token_ids
    )


def test_many_prompts_keep_their_order(tiny):
    prompts = prompts_of(5, 2, 9, 3, 7, 4, 1)
    wishes = SamplingParams(temperature=0, max_tokens=4)
    batched = generate(tiny, prompts, wishes, batch_size=3)
    assert [output.prompt_token_ids for output in batched] == prompts
    assert [output.prompt_index for output in batched] == list(range(7))
    one = generate(tiny, prompts[4:5], wishes)[0]
    assert batched[4].token_ids == one.token_ids
    assert batched.stats.new_tokens == 28 and batched.stats.prompt_tokens == 31
    assert batched.tokens_per_second == 28 / batched.stats.seconds > 0


# Log probabilities of the prompt


def test_echo_scores_the_prompt(tiny):  # R92
    config, params, _ = tiny
    prompt = prompts_of(7)[0]
    wishes = SamplingParams(
        temperature=0, max_tokens=0, echo=True, logprobs=1, top_k=1, logit_bias={prompt[3]: -100}
    )
    got = generate(tiny, [prompt, prompt[:1]], wishes)
    assert got[0].token_ids == [] and got[0].finish_reason == "length" and got[0].logprobs == []
    assert got[1].prompt_logprobs == [None]
    assert got[0].prompt_logprobs[0] is None
    wanted = jax.nn.log_softmax(transformer.forward(config, params, np.array([prompt])))[0]
    for place, entry in enumerate(got[0].prompt_logprobs[1:]):
        assert entry.token_id == prompt[place + 1]
        np.testing.assert_allclose(entry.logprob, wanted[place, entry.token_id], atol=1e-5)
        assert entry.top[0].token_id == int(wanted[place].argmax()) and len(entry.top) == 1


# Ends


def test_any_end_token_of_the_union_ends_the_text():  # R6
    words = ["a", "b", "c", "<end2>"]
    config, params, tokenizer = scripted_model(words, ["a", "b", "<end2>", "c"], eos=(1, 5))
    config = config.replace(eos_token_id=(1,))
    tokenizer.eos_token_ids = (1, 5)  # as from generation_config.json
    got = generate((config, params, tokenizer), ["a"], temperature=0, max_tokens=6)[0]
    assert (got.text, got.finish_reason, got.token_ids) == ("b", "stop", [3, 5])
    on = generate((config, params, tokenizer), ["a"], temperature=0, max_tokens=3, ignore_eos=True)[
        0
    ]
    assert (on.text, on.finish_reason) == ("b<end2>c", "length")
    held = generate((config, params, tokenizer), ["a"], temperature=0, max_tokens=3, min_tokens=3)
    assert 5 not in held[0].token_ids


def test_ids_without_a_token_are_never_sampled():  # R21
    words = [f"w{i}" for i in range(118)]
    config = tiny_config(bos_token_id=0, eos_token_id=())
    tokenizer = word_tokenizer(words)
    params = scripted_params(config, {5: 125, 6: 7})
    model = (config, params, tokenizer)
    got = generate(model, [[5]] * 3, SamplingParams(max_tokens=30, seed=1, temperature=2.0))
    assert all(token < 120 for output in got for token in output.token_ids)
    assert generate(model, [[5]], temperature=0, max_tokens=1)[0].token_ids[0] < 120
    assert generate((config, params, None), [[5]], temperature=0, max_tokens=1)[0].token_ids == [
        125
    ]


def test_stop_string_across_tokens():  # R93
    words = ["STR", "UV", "WX", "Y", "Z!", "go"]
    model = scripted_model(words, ["go", "STR", "UV", "WX", "Y", "Z!"])
    wishes = SamplingParams(temperature=0, max_tokens=9, stop=("UVWXYZ",))
    pieces = []
    got = generate(model, ["go"], wishes, stream=pieces.append)[0]
    assert (got.text, got.finish_reason) == ("STR", "stop")
    assert "".join(piece.text for piece in pieces) == "STR"
    assert [piece.finish_reason for piece in pieces] == [None] * 4 + ["stop"]
    assert got.token_ids == [2, 3, 4, 5, 6]
    short = generate(model, ["go"], wishes.replace(max_tokens=3))[0]
    assert (short.text, short.finish_reason) == ("STRUVWX", "length")
    late = generate(model, ["go"], wishes.replace(min_tokens=5, max_tokens=5))[0]
    assert late.text == "STRUVWXYZ!"


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 100])
def test_stop_strings_do_not_depend_on_where_pieces_are_cut(cut):
    for text, stops, wanted in (
        ("xabcd", ("abcd", "bc"), "xa"),
        ("xabab.", ("abab.", "zz"), "x"),
        ("aab", ("ab",), "a"),
        ("aaab", ("aab", "b"), "a"),
        ("no end her", ("here", "hex"), "no end her"),
        ("héllo 한글", ("한글",), "héllo "),
    ):
        matcher = StopMatcher(stops)
        shown = [matcher.push(text[i : i + cut]) for i in range(0, len(text), cut)]
        whole = "".join(shown) + (matcher.flush() if matcher.stopped is None else "")
        assert whole == wanted, (text, stops)


def test_streaming_joins_to_the_text():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from llama_jax.formats.byte_level import byte_alphabet
    from llama_jax.formats.tokenizer import Tokenizer
    from llama_jax.formats.tokenizer_files import TokenizerSettings

    backend = Backend(models.BPE(vocab=dict(byte_alphabet()), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(
        backend, source="test", prefix_rule="none", settings=TokenizerSettings(), adds_bos=False
    )
    config = tiny_config(vocab_size=256, eos_token_id=())
    said = "a한🙂".encode()
    params = scripted_params(config, dict(itertools.pairwise(said)))
    pieces = []
    prompts, wishes = ["a", "xyz", "한"[:1]], SamplingParams(max_tokens=12, seed=3, logprobs=2)
    texts = generate((config, params, tokenizer), prompts, wishes, stream=pieces.append)
    for output in texts:
        mine = [piece for piece in pieces if piece.prompt_index == output.prompt_index]
        assert "".join(piece.text for piece in mine) == output.text
        assert [t for piece in mine for t in piece.token_ids] == output.token_ids
        assert [p for piece in mine for p in piece.logprobs] == output.logprobs
        joined = b"".join(entry.bytes for entry in output.logprobs)
        assert joined.decode("utf-8", "replace") == output.text
    greedy = generate((config, params, tokenizer), ["a"], temperature=0, max_tokens=len(said) - 1)
    assert greedy[0].text == "한🙂"
    echoed = generate((config, params, tokenizer), ["a"], temperature=0, max_tokens=3, echo=True)
    assert echoed[0].text == "a한"


# Limits


def test_an_adapter_for_one_call(tiny, tmp_path):
    config, params, _ = tiny
    adapted = add_lora(config, params, LoraConfig(r=4, lora_alpha=64), jax.random.key(0))
    leaves = tree.flatten(adapted)
    for path, leaf in leaves.items():
        if isinstance(leaf, LoraTensor):
            lora_b = jax.random.normal(jax.random.key(1), leaf.lora_b.shape)
            leaves[path] = dataclasses.replace(leaf, lora_b=lora_b)
    adapted = tree.unflatten(leaves)
    save_adapter(tmp_path / "adapter", config, adapted, base_model_name_or_path="tiny")
    prompt = prompts_of(9)
    plain = generate(tiny, prompt, GREEDY)[0].token_ids
    wanted = generate((config, adapted, None), prompt, GREEDY)[0].token_ids
    got = generate(tiny, prompt, GREEDY, adapter=tmp_path / "adapter")[0].token_ids
    assert got == wanted != plain
    assert generate(tiny, prompt, GREEDY)[0].token_ids == plain


def test_context_limits(tiny):  # R94, R95
    with pytest.raises(ValueError, match=r"prompt 1 has 257 tokens.*256"):
        generate(tiny, [[3], [3] * 257], GREEDY)
    with pytest.raises(ValueError, match=r"prompt 0 has 33 tokens.*32"):
        generate(tiny, [[3] * 33], GREEDY, max_context=32)
    with pytest.raises(ValueError, match=r"max_context is 300.*256"):
        generate(tiny, [[3]], GREEDY, max_context=300)
    capped = generate(tiny, [[3] * 30, [4] * 32], temperature=0, max_tokens=10**9, max_context=32)
    assert [len(output.token_ids) for output in capped] == [2, 0]
    assert {output.finish_reason for output in capped} == {"length"}
    none = generate(tiny, [[3]], temperature=0, max_tokens=0)[0]
    assert (none.token_ids, none.finish_reason, none.text) == ([], "length", None)


def test_bad_requests_say_what_is_wrong(tiny):
    config, params, _ = tiny
    for prompts, wishes, message in (
        (["text"], {}, "no tokenizer"),
        ([[128]], {}, "128; ids are 0 to 127"),
        ([[-1]], {}, "-1; ids are 0 to 127"),
        ([[True]], {}, "True"),
        ([[3]], {"stop": ("a",)}, "stop strings"),
        ([[3]], {"logit_bias": {128: 1.0}}, "logit_bias of prompt 0 names token 128"),
        ([[3]], {"top_q": 1}, "top_q"),
        ([3.5], {}, "3.5"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(tiny, prompts, **wishes)
    with pytest.raises(ValueError, match="both given"):
        generate(tiny, [[3]], GREEDY, top_k=3)
    with pytest.raises(ValueError, match="2 params are given for 1"):
        generate(tiny, [[3]], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate(tiny, [[3]], GREEDY, batch_size=0)
    empty = generate(tiny, [[]], GREEDY)[0]
    assert empty.prompt_token_ids == [config.bos_token_id]
    with pytest.raises(ValueError, match="no begin token"):
        generate((config.replace(bos_token_id=None), params, None), [[]], GREEDY)
    assert generate(tiny, [], GREEDY) == []


def test_broken_weights_are_an_error_not_a_text(tiny):
    config, params, _ = tiny
    broken = {**params, "norm": {"weight": params["norm"]["weight"] * np.float32(np.nan)}}
    with pytest.raises(FloatingPointError, match="NaN"):
        generate((config, broken, None), [[3]], GREEDY)


def test_single_prompts_need_no_list(tiny):
    one = generate(tiny, [3, 4, 5], GREEDY)
    assert len(one) == 1 and one[0].prompt_token_ids == [3, 4, 5]
    assert dataclasses.asdict(one[0])["text"] is None


def test_row_pieces_never_show_what_is_taken_back():
    tokenizer = word_tokenizer(["ab", "a", "b!", "c"])
    params = SamplingParams(stop=("ab!",), max_tokens=9)
    row = Row(
        prompt="", prompt_token_ids=[0], params=params, seed=0, prompt_index=0, index=0,
        limit=9, end_tokens=frozenset({1}), tokenizer=tokenizer, continues_text=True,
    )  # fmt: skip
    shown = [row.push(token, None).text for token in (5, 3)]
    assert shown == ["c", ""]
    assert row.push(5, None).text == "ac"
    assert row.push(3, None).text == ""
    last = row.push(4, None)
    assert (last.text, last.finish_reason, row.output().text) == ("", "stop", "cac")


def test_a_dict_is_no_list_of_its_keys():
    config = tiny_config()
    for chat, wanted in ((False, "give text"), (True, "give a list of messages")):
        with pytest.raises(ValueError, match=f"prompts is a dict with prompt; {wanted}"):
            generate((config, tiny_params(config), None), {"prompt": [1]}, chat=chat)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (None, {}, "prompts is of type NoneType; give text, token ids or a list of those"),
        (b"ab", {}, "prompts is of type bytes"),
        ([b"ab"], {}, "prompt 0 is b'ab'; give text or token ids"),
        (np.array(5), {}, "prompts is of type ndarray"),
        ([[3]], {"compute": "bfloat16"}, "compute is of type str; give a Compute"),
        ([[3]], {"mesh": 5}, "mesh is of type int; give a Mesh"),
        ([[3]], {"adapter": 5}, "adapter is of type int; give a PEFT adapter folder"),
        ([[3]], {"stream": 5}, "stream is of type int; give a function"),
    ],
)
def test_arguments_of_another_type_are_named(tiny, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny, prompts, GREEDY, **options)


@pytest.mark.parametrize("params", [{"max_tokens": 1}, [{"max_tokens": 1}], 5, "greedy"])
def test_params_of_another_type_are_named(tiny, params):
    with pytest.raises(ValueError, match=r"params is of type (dict|int|str); give SamplingParams"):
        generate(tiny, [[3]], params)
    with pytest.raises(ValueError, match="params and top_k are both given"):
        generate(tiny, [[3]], params, top_k=1)


def test_end_tokens_without_a_row_are_never_emitted(tiny):
    config, params, _ = tiny
    model = (config.replace(eos_token_id=(500, 2)), params, None)
    wishes = {"temperature": 0, "max_tokens": 3, "min_tokens": 3, "logit_bias": {5: -100}}
    assert generate(model, [[3]], **wishes) == generate(tiny, [[3]], **wishes)


@pytest.mark.parametrize("begin", [-1, 128, 900])
def test_a_begin_token_without_a_row_is_none(tiny, begin):
    config, params, _ = tiny
    with pytest.raises(ValueError, match="prompt 0 is empty and the model has no begin token"):
        generate((config.replace(bos_token_id=begin), params, None), [[]], GREEDY)


@pytest.mark.parametrize("model", [None, "smollm2-135m", ({}, {})])
def test_what_is_no_model_is_named(model):
    with pytest.raises(ValueError, match="model is of type .*; give what load gives"):
        generate(model, ["a"], GREEDY)


def test_a_conversation_that_cannot_be_rendered_is_told_from_the_others():
    model = scripted_model(["a"], ["a"], template="{{ messages[0].content }}")
    talks = [[{"role": "user", "content": text}] for text in ("a", None)]
    with pytest.raises(ValueError, match=r"prompt 1: messages\[0\]: content is None"):
        generate(model, talks, GREEDY, chat=True)
