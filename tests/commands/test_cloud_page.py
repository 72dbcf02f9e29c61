"""The commands of docs/cloud-tpu.md parse, and those that launch run on paper."""

import re
import shlex
from pathlib import Path

import pytest

from llama_jax import cli

PAGE = (Path(__file__).parent.parent.parent / "docs/cloud-tpu.md").read_text()
LINES = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
OURS = [words[1:] for words in LINES if words[0] == "llama-jax"]


def test_every_command_that_exists_parses() -> None:
    assert {words[0] for words in OURS} >= {"launch", "export", "generate"}
    for words in OURS:
        if words[0] in cli.COMMANDS:
            assert cli.make_parser().parse_args(words).command == words[0]


@pytest.mark.parametrize("words", [each for each in OURS if each[0] == "launch"], ids=" ".join)
def test_launches_run_on_paper(words, capsys) -> None:
    filled = [
        word.replace("PROJECT", "my-project")
        .replace("BUCKET", "bucket")
        .replace("llama3.1-8b-full-v5e-16.yaml", "tiny-lora-cpu.yaml")
        for word in words
    ]
    # The tiny config's batch is too small for sixteen chips.
    filled += ["train.batch_size=16", *({"--dry-run"} - set(filled))]
    assert cli.main(filled) == 0
    shown = capsys.readouterr().out
    assert "kubectl apply" in shown if "--gke" in words else "gcloud compute tpus" in shown


def test_google_clouds_own_commands_name_things_once() -> None:
    for words in LINES:
        if words[:2] == ["gcloud", "storage"] and "create" in words:
            assert "--enable-hierarchical-namespace" in words
    # No value of a secret stands in a command.
    assert not re.search(r"--data-file=(?!-\n)", PAGE)
