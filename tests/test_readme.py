"""What the README shows works: commands parse, extras and files exist, the example runs."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.demo.make_tokenizer import FOLDER as TOKENIZER
from llama_jax.formats.hf import save_hf
from llama_jax.formats.tokenizer import load_tokenizer
from tests.tiny import tiny_config, tiny_params

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "docs/architecture.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def shell_lines() -> Iterator[list[str]]:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield words


def lines_of(program: str) -> list[list[str]]:
    found = [words for words in shell_lines() if words[0] == program]
    assert found, f"no page shows {program}"
    return found


@pytest.mark.parametrize("words", lines_of("llama-jax"), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    args = cli.make_parser().parse_args(words[1:])
    for name in getattr(args, "data", None) or []:
        assert (ROOT / name).is_file()
    if args.command == "train":
        from llama_jax.commands.run_config import find_config
        from train.config import load_run_config

        load_run_config(find_config(args.config), args.overrides)


def test_every_command_of_the_readme_exists_and_every_command_is_shown() -> None:
    shown = {words[1] for words in lines_of("llama-jax")}
    # The demo is shown as `make demo`.
    assert shown | {"demo"} == set(cli.COMMANDS)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in lines_of("make"):
        assert words[1] in targets


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for words in lines_of("pip"):
        for named in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert named in extras["optional-dependencies"]


def test_links_to_files_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_python_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("README.md", "python")
    assert len(example.strip().splitlines()) <= 6
    config = tiny_config(vocab_size=264, bos_token_id=None, eos_token_id=(258,))
    tokenizer = load_tokenizer(TOKENIZER)
    save_hf(tmp_path / "tiny", config, tiny_params(config), tokenizer=tokenizer)
    assert '"smollm2-135m"' in example
    names: dict[str, object] = {}
    exec(example.replace('"smollm2-135m"', repr(str(tmp_path / "tiny"))), names)
    assert capsys.readouterr().out.strip() == names["outputs"][0].text.strip()  # type: ignore[index]


def test_the_architecture_page_names_what_is_there() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    for name in re.findall(r"`((?:llama_jax|train|infer|configs|tests)/[\w/]*(?:\.py)?)`", page):
        assert (ROOT / name).exists(), f"docs/architecture.md names {name}"
    for package in ("llama_jax", "train", "infer"):
        for path in (ROOT / package).iterdir():
            if path.is_dir() and path.name not in ("__pycache__",):
                assert f"{path.name}/" in page, f"docs/architecture.md does not name {path}"
