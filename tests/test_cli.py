"""The door: help, exit codes, what goes to which stream."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax import __version__, cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE_DIR", "off")


def run_cli(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama_jax.cli", *argv],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_help_lists_every_command_and_answers_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = run_cli("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert answer.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n    {name}" in answer.stdout
    # Processor time, which other tests at the same time do not stretch.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  llama-jax {name}" in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_example_in_the_help_parses(name: str) -> None:
    import shlex

    words = shlex.split(cli.command_module(name).EXAMPLE)
    assert words[:2] == ["llama-jax", name]
    assert cli.make_parser().parse_args(words[1:]).command == name


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["models", "--nope"], ["doctor", "--timeout"]])
def test_wrong_words_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error:" in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"llama-jax {__version__}\n"


def test_a_wrong_value_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--timeout", "0", "--json"]) == cli.WRONG_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "llama-jax doctor: error: --timeout must be more than 0 seconds, not 0.0\n"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("two\nlines"), cli.WRONG_INPUT),
        (FileNotFoundError(2, "No such file", "a.yaml"), cli.WRONG_INPUT),
        (RuntimeError("device lost"), cli.FAILED),
        (OSError(28, "No space left on device"), cli.FAILED),
        (MemoryError(), cli.FAILED),
        (KeyboardInterrupt(), cli.INTERRUPTED),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr(cli.command_module("models"), "run", fail)
    assert cli.main(["models", "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llama-jax models: error: ")
    assert captured.err.count("\n") == 1


def test_an_interrupted_program_ends_at_once_and_others_as_python_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(cli.os, "_exit", ended.append)
    for code in (cli.DONE, cli.WRONG_INPUT, cli.INTERRUPTED):
        monkeypatch.setattr(cli, "main", lambda code=code: code)
        with pytest.raises(SystemExit) as end:
            cli.program()
        assert end.value.code == code
    assert ended == [cli.INTERRUPTED]


def test_a_bug_shows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(cli.command_module("models"), "run", fail)
    with pytest.raises(KeyError):
        cli.main(["models"])

    def refuse(args: object) -> None:
        raise ValueError("where from?")

    monkeypatch.setattr(cli.command_module("models"), "run", refuse)
    with pytest.raises(ValueError, match="where from"):
        cli.main(["models", "--traceback"])


def test_json_is_alone_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(args: object) -> dict[str, int]:
        print("some library talks")
        return {"answer": 1}

    monkeypatch.setattr(cli.command_module("models"), "run", chatty)
    assert cli.main(["models", "--json"]) == cli.DONE
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"answer": 1}
    assert captured.err == "some library talks\n"


def test_a_report_that_is_not_ok_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.command_module("doctor"), "run", lambda args: {"ok": False})
    assert cli.main(["doctor", "--json"]) == cli.FAILED
    assert json.loads(capsys.readouterr().out) == {"ok": False}


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    program = f"{sys.executable} -m llama_jax.cli models --json | head -c 1"
    answer = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert answer.stdout == "["
    assert "Traceback" not in answer.stderr


def test_models_lists_every_preset_with_published_sizes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llama_jax.presets import presets

    assert cli.main(["models", "--json"]) == cli.DONE
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(presets)
    # The counts that the models' makers publish.
    assert listed["llama-7b"]["parameters"] == 6_738_415_616
    assert listed["llama3.1-8b"]["parameters"] == 8_030_261_248
    assert listed["smollm2-135m"]["parameters"] == 134_515_008
    assert listed["llama3.1-8b"]["key_value_heads"] == 8
    assert listed["llama3.1-8b"]["rope_scaling"] == "llama3"
    assert listed["mixtral-8x7b"]["experts"] == 8
    assert listed["llama3.1-8b"]["train"] == [
        "pretrain",
        "full",
        "lora",
        "qlora",
        "qat",
        "dpo",
        "distill",
    ]
    formats = ["hf", "peft", "gguf", "compressed-tensors", "stablehlo"]
    assert listed["llama3.1-8b"]["export"] == formats

    assert cli.main(["models"]) == cli.DONE
    shown = capsys.readouterr().out
    assert all(name in shown for name in presets)
    assert f"export: {', '.join(formats)}\n" in shown


def test_the_offered_schemes_are_those_of_the_library() -> None:
    from llama_jax.commands.quantize import SCHEMES
    from llama_jax.weights import quantize

    # Stated twice so that --help needs no JAX.
    assert set(SCHEMES) == {*quantize.SCHEMES, *quantize.ROUNDING_SCHEMES, "qat"}


def test_overrides_may_stand_behind_flags(capsys):
    words = ["train", "tiny-lora-cpu.yaml", "train.steps=7", "--json", "train.batch_size=9"]
    args = cli._parse(words)
    assert args.overrides == ["train.steps=7", "train.batch_size=9"] and args.json
    for wrong in ("--steps=7", "steps"):
        with pytest.raises(SystemExit):
            cli._parse([*words, wrong])
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
