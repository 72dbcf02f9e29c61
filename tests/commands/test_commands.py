"""Every command on a tiny model: what it writes, what it reports, what it refuses."""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import cli, tree
from llama_jax.commands.models import describe
from llama_jax.demo.make_tokenizer import FOLDER as TOKENIZER
from llama_jax.formats.hf import save_hf
from llama_jax.formats.tokenizer import load_tokenizer
from llama_jax.weights.lora import remove_lora
from tests.tiny import FAMILIES, tiny_config, tiny_params

pytestmark = pytest.mark.compiled_quickly

VOCABULARY = 264
Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE_DIR", "off")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder of a tiny random model with a byte tokenizer."""
    config = tiny_config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=(258,))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_hf(folder, config, tiny_params(config), tokenizer=load_tokenizer(TOKENIZER))
    return str(folder)


@pytest.fixture(scope="module")
def says_hi(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that answers "hi" to everything: each token decides the next, nothing else does."""
    config = tiny_config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=(258,))
    leaves = {
        path: np.zeros(leaf.shape, np.float32)
        for path, leaf in tree.flatten(tiny_params(config)).items()
    }
    leaves["norm.weight"] += 1
    end = 258
    for place, (token, following) in enumerate([("\n", "h"), ("h", "i"), ("i", None)]):
        leaves["embed_tokens.weight"][ord(token), place] = 1
        leaves["lm_head.weight"][end if following is None else ord(following), place] = 1
    folder = tmp_path_factory.mktemp("models") / "hi"
    params = jax.tree.map(jax.numpy.asarray, tree.unflatten(leaves))
    save_hf(folder, config, params, tokenizer=load_tokenizer(TOKENIZER))
    return str(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object) -> tuple[int, Any, str]:
        """(exit code, the JSON value or None, standard error)"""
        code = cli.main([*map(str, argv), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return call


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def same_params(left: Any, right: Any) -> bool:
    one, two = tree.flatten(left), tree.flatten(right)
    return list(one) == list(two) and all(
        np.array_equal(np.asarray(one[path]), np.asarray(two[path])) for path in one
    )


# generate


def test_generate_reports_texts_ids_and_reasons(model: str, run: Run) -> None:
    code, report, _ = run("generate", model, "--prompt", "ab", "cde", "--max-tokens", 5)
    assert code == 0
    assert [output["prompt"] for output in report["outputs"]] == ["ab", "cde"]
    assert report["tokens_per_second"] > 0
    expected = lj.generate(lj.load(model), ["ab", "cde"], temperature=0.0, max_tokens=5)
    for output, wanted in zip(report["outputs"], expected, strict=True):
        assert output["token_ids"] == wanted.token_ids
        assert output["text"] == wanted.text
        assert output["finish_reason"] == wanted.finish_reason
        assert "logprobs" not in output


def test_generate_n_seed_and_logprobs(model: str, run: Run) -> None:
    flags = ("--prompt", "ab", "--n", 3, "--seed", 7, "--temperature", 1, "--max-tokens", 4)
    _, first, _ = run("generate", model, *flags, "--logprobs", 2)
    _, again, _ = run("generate", model, *flags)
    ids = [output["token_ids"] for output in first["outputs"]]
    assert ids == [output["token_ids"] for output in again["outputs"]]
    assert len({tuple(each) for each in ids}) == 3
    assert [output["index"] for output in first["outputs"]] == [0, 1, 2]
    token = first["outputs"][0]["logprobs"][0]
    assert token["token_id"] == ids[0][0] and token["logprob"] <= 0
    assert len(token["top"]) == 2 and isinstance(token["bytes"], list)


def test_generate_from_a_file_of_prompts_or_conversations(
    model: str, run: Run, tmp_path: Path
) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", {"prompt": "ab"}, {"prompt": "cd"})
    _, report, _ = run("generate", model, "--prompts", prompts, "--max-tokens", 2)
    assert [output["prompt"] for output in report["outputs"]] == ["ab", "cd"]
    message = {"role": "user", "content": "ab"}
    chats = write_rows(tmp_path / "c.jsonl", {"messages": [message]})
    _, talk, _ = run("generate", model, "--prompts", chats, "--max-tokens", 3)
    _, same, _ = run("generate", model, "--prompt", "ab", "--chat", "--max-tokens", 3)
    assert talk["outputs"][0]["prompt"] == [message]
    assert talk["outputs"][0]["token_ids"] == same["outputs"][0]["token_ids"]
    assert talk["outputs"][0]["token_ids"] != report["outputs"][0]["token_ids"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "holds no prompts"),
        ("nonsense\n", "line 1: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2: a row is"),
        ('{"prompt": "a", "n": 2}\n', "line 1: a row is"),
        ('{"prompt": "a", "prompt": "b"}\n', "line 1: not JSON: 'prompt' appears twice"),
        ('{"prompt": ""}\n', 'line 1: prompt is ""; it must be a text that is not empty'),
        ('{"messages": "a"}\n', 'line 1: messages is "a"; it must be a list of messages that'),
        ('\n{"messages": [{"role": "user"}]}\n', "prompt 0: messages[0]: content is None"),
        ('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n', "mixed"),
    ],
)
def test_generate_refuses_files_it_does_not_understand(
    rows: str, message: str, model: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(rows)
    code, report, error = run("generate", model, "--prompts", tmp_path / "p.jsonl")
    assert (code, report) == (2, None)
    assert message in error


def test_a_file_of_prompts_may_begin_with_a_mark(model: str, run: Run, tmp_path: Path) -> None:
    """As files of rows may, and as some editors write them."""
    (tmp_path / "p.jsonl").write_text('\ufeff{"prompt": "a"}\r\n', encoding="utf-8")
    code, report, _ = run("generate", model, "--prompts", tmp_path / "p.jsonl", "--max-tokens", 1)
    assert code == 0 and report["outputs"][0]["prompt"] == "a"


def test_weights_that_are_not_finite_are_one_line(model: str, run: Run, tmp_path: Path) -> None:
    loaded = lj.load(model)
    loaded.params["norm"]["weight"] *= np.float32(np.nan)
    lj.save_hf(loaded, tmp_path / "nan")
    message = {"role": "user", "content": "a"}
    rows = write_rows(
        tmp_path / "r.jsonl", {"messages": [message, {"role": "assistant", "content": "b"}]}
    )
    for command in (("generate", "--prompt", "a"), ("eval", "--data", rows)):
        code, report, error = run(command[0], tmp_path / "nan", *command[1:])
        assert (code, report) == (1, None)
        assert "logits are NaN or infinite" in error.splitlines()[-1]


def test_a_file_of_prompts_without_a_name(model: str, run: Run) -> None:
    code, _, error = run("generate", model, "--prompts", "")
    assert code == 2 and "the name of the file of prompts is empty" in error


def test_a_model_is_not_replaced_by_what_is_made_of_it(
    model: str, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "outer" / "inner")
    (tmp_path / "outer" / "config.json").write_text("{}")
    inner, outer = tmp_path / "outer" / "inner", tmp_path / "outer"
    code, _, error = run("convert", inner, outer, "--overwrite")
    assert code == 2 and f"MODEL {inner} lies in OUT {outer}" in error
    assert inner.is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--top-p", "1.5"), "top_p is 1.5"),
        (("--max-tokens", "-1"), "max_tokens is -1"),
        (("--n", "0"), "n is 0"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--adapter", ""), "the adapter's name is empty"),
        (("--adapter", "nowhere"), "nowhere"),
    ],
)
def test_generate_refuses_wrong_values(
    flags: tuple[str, ...], message: str, model: str, run: Run
) -> None:
    code, report, error = run("generate", model, "--prompt", "a", *flags)
    assert (code, report) == (2, None)
    assert message in error
    assert error.count("\n") == 1


def test_flags_of_drawing_are_said_to_have_no_effect_where_nothing_is_drawn(
    model: str, run: Run
) -> None:
    asked = ("generate", model, "--prompt", "a", "--max-tokens", "1")
    code, _, said = run(*asked, "--seed", "5", "--top-p", "0.9")
    assert code == 0 and "--top-p, --seed: no effect at --temperature 0, which" in said
    for flags in ((), ("--seed", "5", "--temperature", "1")):
        code, _, said = run(*asked, *flags)
        assert code == 0 and "no effect" not in said


@pytest.mark.parametrize(
    "name", ["", " ", "..", "../../outside", "/nowhere/at/all", "a/../../b", "a\\b", "nonsense"]
)
@pytest.mark.parametrize("command", ["generate", "eval", "convert"])
def test_r116_model_names_that_name_nothing(
    command: str, name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    rows = write_rows(tmp_path / "t.jsonl", {"text": "a"})
    rest = {
        "generate": ("--prompt", "a"),
        "eval": ("--data", rows),
        "convert": (tmp_path / "out",),
    }[command]
    code, report, error = run(command, name, *rest)
    assert (code, report) == (2, None)
    assert error.startswith(f"llama-jax {command}: error: ")
    assert not (tmp_path / "out").exists()


def test_generate_shows_one_text_while_it_grows(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", model, "--prompt", "ab", "--max-tokens", "5"]) == 0
    captured = capsys.readouterr()
    wanted = lj.generate(lj.load(model), ["ab"], temperature=0.0, max_tokens=5)[0]
    assert captured.out == f"{wanted.text}\n"
    assert "tokens/s" in captured.err
    cli.main(["generate", model, "--prompt", "ab", "cd", "--max-tokens", "2", "--logprobs"])
    shown = capsys.readouterr().out
    assert "--- ab\n" in shown and "--- cd\n" in shown and '"logprob"' in shown


# chat


def test_chat_reads_lines_and_answers(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n/reset\n/quit\n"))
    assert cli.main(["chat", model, "--temperature", "0", "--max-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    message = [{"role": "user", "content": "ab"}]
    wanted = lj.generate(lj.load(model), [message], chat=True, temperature=0.0, max_tokens=4)
    assert shown.startswith(wanted[0].text or "?")
    assert "> " not in shown.replace(wanted[0].text or "", "")


# eval


def test_eval_of_text_rows(model: str, run: Run, tmp_path: Path) -> None:
    texts = ["some text", "other", "x" * 300]
    rows = write_rows(tmp_path / "t.jsonl", *({"text": text} for text in texts))
    code, report, _ = run("eval", model, "--data", rows)
    assert code == 0
    # Every byte, and the end token of each row; the first token of a row or piece is not predicted.
    # The long row does not fit the context of 256 tokens and is split into two pieces, which
    # overlap by one token.
    assert report["tokens"] == sum(len(text) for text in texts)
    assert report["perplexity"] == pytest.approx(np.exp(report["loss"]))
    assert "exact_match" not in report
    loaded = lj.load(model)
    total = 0.0
    for text in texts[:2]:
        ids = np.asarray([*text.encode(), 258])
        logits = jax.nn.log_softmax(lj.forward(loaded.config, loaded.params, ids[None, :-1]))
        total -= float(np.asarray(logits)[0][np.arange(len(ids) - 1), ids[1:]].sum())
    short = write_rows(tmp_path / "s.jsonl", *({"text": text} for text in texts[:2]))
    _, report, _ = run("eval", model, "--data", short)
    assert report["loss"] == pytest.approx(total / report["tokens"], abs=1e-5)


def test_eval_of_chat_rows_counts_exactly_right_answers(
    says_hi: str, run: Run, tmp_path: Path
) -> None:
    def row(*answers: str) -> dict[str, Any]:
        turns = [[("user", "ab"), ("assistant", answer)] for answer in answers]
        return {
            "messages": [{"role": who, "content": said} for turn in turns for who, said in turn]
        }

    answers = [("hi",), ("ho",), ("hi there",), ("no", "hi"), ("hi", "no"), ("h",)]
    rows = write_rows(tmp_path / "c.jsonl", *(row(*each) for each in answers))
    code, report, error = run("eval", says_hi, "--data", rows)
    assert code == 0
    # Of several turns the last is asked for: rows 1 and 4 are right.
    assert report["exact_match"] == pytest.approx(2 / 6)
    assert report["rows"] == 6
    # Every assistant turn's bytes and its terminator; the line feed behind is the template's.
    assert report["tokens"] == sum(len(said) + 1 for each in answers for said in each)
    assert "6/6 answers generated" in error
    _, report, _ = run("eval", says_hi, "--data", rows, "--no-exact-match")
    assert "exact_match" not in report


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ('{"text": ""}\n', (), "line 1: text is empty"),
        ('{"prompt": "a"}\n', (), "line 1"),
        ('{"text": "abc"}\n', ("--sequence-length", "1"), "takes 2 to 256 tokens"),
        ('{"text": "abc"}\n', ("--sequence-length", "300"), "takes 2 to 256 tokens"),
        ('{"text": "abc"}\n', ("--batch-size", "0"), "--batch-size must be at least 1"),
        (
            '{"text": "abc"}\n',
            ("--no-exact-match", "--cache-dtype", "int8"),
            "--cache-dtype is about generating, which --no-exact-match leaves out",
        ),
        (
            '{"text": "abc"}\n{"instruction": "abc", "output": "def"}\n',
            ("--cache-dtype", "int8"),
            "--cache-dtype is about generating, but only chat rows are answered",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}\n',
            (),
            "line 1: the one assistant turn comes first",
        ),
        (
            '{"instruction": "abc", "output": "def"}\n',
            ("--sequence-length", "8"),
            "tokens, but --sequence-length is 8; give more, up to the model's 256",
        ),
    ],
)
def test_eval_refuses(
    rows: str, flags: tuple[str, ...], message: str, model: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(rows)
    code, report, error = run("eval", model, "--data", tmp_path / "d.jsonl", *flags)
    assert (code, report) == (2, None)
    assert message in error


def test_eval_of_a_missing_file_is_wrong_input(model: str, run: Run) -> None:
    code, _, error = run("eval", model, "--data", "nowhere.jsonl")
    assert code == 2
    assert "nowhere.jsonl" in error


# convert, export, quantize


def test_convert_keeps_every_value(model: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    code, report, _ = run("convert", model, out)
    assert code == 0
    loaded, again = lj.load(model), lj.load(out)
    assert again.config == loaded.config
    assert same_params(loaded.params, again.params)
    assert again.tokenizer is not None
    assert again.tokenizer.encode("ab") == loaded.tokenizer.encode("ab")
    assert report["parameters"] == sum(x.size for x in jax.tree.leaves(loaded.params))
    assert report["bytes"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())


def test_export_to_hugging_face_gives_the_same_bytes(model: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    code, report, _ = run("export", model, out, "--format", "hf")
    assert code == 0
    assert sorted(report["files"]) == sorted(str(path) for path in out.iterdir())
    assert report["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    name = "model.safetensors"
    assert (out / name).read_bytes() == (Path(model) / name).read_bytes()
    _, report, _ = run(
        "export", model, tmp_path / "half", "--format", "hf", "--dtype", "bfloat16",
        "--max-shard-size", "40KB",
    )  # fmt: skip
    assert len([file for file in report["files"] if file.endswith(".safetensors")]) > 1
    assert lj.load(tmp_path / "half").params["norm"]["weight"].dtype == "bfloat16"


def test_export_to_gguf_is_a_model_again(run: Run, tmp_path: Path) -> None:
    # Without a tokenizer: GGUF has no name for the way the byte tokenizer cuts text.
    config = tiny_config()
    save_hf(tmp_path / "tiny", config, tiny_params(config))
    out = tmp_path / "m.gguf"
    code, report, _ = run("export", tmp_path / "tiny", out, "--format", "gguf")
    assert code == 0
    assert report == {"files": [str(out)], "bytes": out.stat().st_size}
    assert same_params(lj.load(tmp_path / "tiny").params, lj.load(out).params)
    small = tmp_path / "small.gguf"
    run("export", tmp_path / "tiny", small, "--format", "gguf", "--dtype", "q8_0")
    assert small.stat().st_size < out.stat().st_size / 2


def test_a_path_of_bytes_that_are_no_text_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_config()
    save_hf(tmp_path / "tiny", config, tiny_params(config))
    out = tmp_path / os.fsdecode(b"m\xff.gguf")
    for flags in ((), ("--json",)):
        written = io.BytesIO()
        output = io.TextIOWrapper(written, "utf-8", errors="strict")
        monkeypatch.setattr("sys.stdout", output)
        argv = ["export", str(tmp_path / "tiny"), str(out), "--format", "gguf", "--overwrite"]
        assert cli.main([*argv, *flags]) == 0
        output.flush()
        if flags:
            assert json.loads(written.getvalue().decode())["files"] == [str(out)]
        else:
            assert written.getvalue().startswith(os.fsencode(out) + b"\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scheme", "int8", "--method", "gptq"), "--method gptq needs rows"),
        (("--scheme", "int8", "--method", "smoothquant"), "use awq or gptq"),
        (("--scheme", "int8-dynamic", "--method", "awq"), "use smoothquant or gptq"),
        (("--scheme", "qat", "--method", "gptq"), "leave --method out"),
        (("--scheme", "int8", "--method", "gptq", "--method", "gptq"), "given twice"),
    ],
)
def test_methods_that_do_not_fit(
    flags: tuple[str, ...], message: str, model: str, run: Run, tmp_path: Path
) -> None:
    code, _, error = run("quantize", model, tmp_path / "q", *flags)
    assert code == 2 and message in error


def test_models_lists_what_each_preset_is_taken_for(run: Run) -> None:
    code, report, _ = run("models")
    assert code == 0
    presets = {preset["name"]: preset for preset in report}
    assert "int8-static" in presets["llama3.1-8b"]["quantize"]
    assert "qat" in presets["llama3.1-8b"]["train"]
    experts = presets["mixtral-8x7b"]
    assert experts["quantize"] == ["int8", "int4", "nf4", "fp8"] and "qat" not in experts["train"]


@pytest.mark.parametrize("scheme", ["int8", "int4-dynamic"])
def test_what_models_does_not_list_for_experts_is_refused(
    scheme: str, run: Run, tmp_path: Path
) -> None:
    config = FAMILIES["mixtral"]
    save_hf(tmp_path / "experts", config, tiny_params(config))
    code, _, error = run("quantize", tmp_path / "experts", tmp_path / "q", "--scheme", scheme)
    listed = scheme in describe("experts", config)["quantize"]
    assert (code == 0) == listed == (scheme == "int8"), error


def test_a_quantized_model_is_merged_onto_itself_or_onto_another(
    model: str, run: Run, tmp_path: Path
) -> None:
    run("quantize", model, tmp_path / "q", "--scheme", "nf4", "--tile", 32)
    flags = ("--format", "hf", "--merge")
    _, itself, _ = run("export", tmp_path / "q", tmp_path / "a", *flags, "--dtype", "bfloat16")
    assert 1e-3 < itself["drift"] < 4e-3
    code, other, _ = run("export", tmp_path / "q", tmp_path / "b", *flags, "--onto", model)
    assert code == 0 and 0.02 < other["drift"] < 0.2
    assert same_params(lj.load(tmp_path / "b").params, lj.load(model).params)
    code, _, error = run(
        "export", tmp_path / "q", tmp_path / "c", "--format", "hf", "--onto", model
    )
    assert code == 2 and "--onto says what to merge onto; it needs --merge" in error


def test_quantize_refuses_contradictions(model: str, run: Run, tmp_path: Path) -> None:
    flags = ("--scheme", "int8", "--all", "--skip", "lm_head")
    code, _, error = run("quantize", model, tmp_path / "q", *flags)
    assert code == 2 and "contradict" in error
    code, _, error = run("quantize", model, tmp_path / "q", "--scheme", "int8", "--skip", "nope")
    assert code == 2 and "nope" in error


# train, and what a run leaves


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the shipped tiny config, a few steps on two of the devices."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    argv = [
        "train", "tiny-lora-cpu.yaml", "train.steps=4", "train.batch_size=8",
        "train.sequence_length=256", "train.eval_every_steps=2", "schedule.warmup_steps=1",
        "lora.lora_dropout=0.125",
        f"output={out}", "--json",
    ]  # fmt: skip
    assert cli.main(argv) == 0
    return out


def test_train_leaves_a_run_folder(trained: Path) -> None:
    entries = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(entries[0])
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 4
    assert (trained / "report.html").is_file()
    assert list((trained / "checkpoints").iterdir())


def test_train_again_is_done_at_once_and_reports_the_same(trained: Path, run: Run) -> None:
    code, report, _ = run(
        "train", "tiny-lora-cpu.yaml", "train.steps=4", "train.batch_size=8",
        "train.sequence_length=256", "train.eval_every_steps=2", "schedule.warmup_steps=1",
        "lora.lora_dropout=0.125",
        f"output={trained}",
    )  # fmt: skip
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert code == 0
    assert report["run_dir"] == str(trained)
    assert report["steps"] == 4
    assert report["final_loss"] == last["loss"]


def test_a_trained_checkpoint_is_a_model_and_its_adapter_is_exported(
    trained: Path, run: Run, tmp_path: Path
) -> None:
    (checkpoint,) = (trained / "checkpoints").glob("step_*4")
    flags = ("--prompt", "ab", "--max-tokens", 6)
    _, tuned, _ = run("generate", checkpoint, *flags)
    code, report, error = run("export", checkpoint, tmp_path / "lora", "--format", "peft")
    assert code == 0, error
    assert {Path(file).name for file in report["files"]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert written["lora_dropout"] == 0.125
    assert written["base_model_name_or_path"] == str(checkpoint), "random weights have no name"
    code, _, error = run("export", checkpoint, tmp_path / "hf", "--format", "hf")
    assert code == 2 and "merge" in error
    code, _, _ = run("export", checkpoint, tmp_path / "hf", "--format", "hf", "--merge")
    assert code == 0
    _, merged, _ = run("generate", tmp_path / "hf", *flags)
    assert merged["outputs"] == tuned["outputs"]


def test_an_exported_adapter_names_the_base_it_was_trained_on_and_keeps_its_dropout(
    trained: Path, model: str, run: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    noted = json.loads((copy / "config.json").read_text())
    noted["model"] |= {"name": model, "init": "weights"}
    (copy / "config.json").write_text(json.dumps(noted))
    first, again = tmp_path / "a", tmp_path / "b"
    assert run("export", copy, first, "--format", "peft")[0] == 0
    written = json.loads((first / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == model
    tuned, base = lj.load(trained), tmp_path / "base"
    lj.save_hf(dataclasses.replace(tuned, params=remove_lora(tuned.params)), base)
    code, _, error = run("export", base, again, "--format", "peft", "--adapter", first)
    assert code == 0, error
    assert json.loads((again / "adapter_config.json").read_text())["lora_dropout"] == 0.125
    (copy / "config.json").write_text("{}")
    code, _, error = run("export", copy, tmp_path / "c", "--format", "peft")
    assert code == 2 and "config.json is not as a run writes it: KeyError('lora')" in error


def test_dry_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, report, _ = run("train", "configs/tiny-lora-cpu.yaml", f"output={out}", "--dry-run")
    assert code == 0
    assert report["dry_run"] is True
    assert 0 < report["trained_parameters"] < report["parameters"]
    assert not out.exists()
    code, _, error = run("train", "configs/tiny-lora-cpu.yaml", "--dry-run", "--profile", "2")
    assert code == 2 and "--profile traces steps, of which --dry-run makes none" in error


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "the name of the run config is empty"),
        ("..", ".. is a folder"),
        ("nowhere.yaml", "tiny-lora-cpu.yaml"),
        ("elsewhere/tiny-lora-cpu.yaml", "does not exist"),
        ("../configs/nowhere.yaml", "does not exist"),
    ],
)
def test_train_refuses_configs_that_are_not_there(config: str, message: str, run: Run) -> None:
    code, report, error = run("train", config)
    assert (code, report) == (2, None)
    assert message in error


def test_train_names_the_unknown_key(run: Run) -> None:
    code, _, error = run("train", "tiny-lora-cpu.yaml", "train.step=3")
    assert code == 2
    assert "steps" in error and "step" in error
