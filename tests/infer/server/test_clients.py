"""Programs of others against the server: the openai package of npm, and lm-eval."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from infer.generate import generate
from infer.server.build import given_sources, make_build
from infer.server.settings import Secret, Settings
from llama_jax.formats import hf
from llama_jax.load import load
from tests.infer.server.running import byte_tokenizer, running, until
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly

NPM = Path(__file__).parent / "npm"
KEY = "a-key-for-npm"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The client with its package, whose hash is in the lock file."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("npm")
    shutil.copytree(NPM, folder, dirs_exist_ok=True)
    done = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"npm cannot install: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
def test_the_npm_client(package):
    with running(api_key=Secret(KEY)) as server:
        done = subprocess.run(
            ["node", "client.mjs", server.url, KEY],
            cwd=package,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["models"] == ["m"]
    assert seen["chat"] == ["Hello there", "stop", "m@1"]
    assert seen["streamed"] == seen["gathered"] == "Hello there"
    assert seen["usage"] > 0
    assert seen["text"][0] == "Hello there" and seen["text"][1] > 0
    assert len(seen["embeddings"]) == 2 and min(seen["embeddings"]) > 0
    assert seen["errors"] == [
        ["NotFoundError", 404, "model"],
        ["BadRequestError", 400, "temperature"],
        ["AuthenticationError", 401, None],
    ]
    assert seen["aborted"]


# lm-eval

ROWS = [
    {"question": "The sky is", "choices": [" blue", " a fish", " seven"], "answer": 0},
    {"question": "Two and two are", "choices": [" red", " four", " wet stones"], "answer": 1},
    {"question": "Fire is", "choices": [" cold", " made of wool", " hot"], "answer": 2},
]


def write_tasks(folder):
    """A task of log likelihoods and one of generation, from a file of rows."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choosing = {
        **shared,
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    writing = {
        **shared,
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 12, "temperature": 0},
        "metric_list": [{"metric": "bypass"}],
    }
    for task in (choosing, writing):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))


def samples_of(folder, task):
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


@pytest.mark.slow
def test_lm_eval_runs_its_tasks_on_the_server(tmp_path):
    """Log likelihoods and texts are those of the model without a server."""
    config = FAMILIES["llama-gqa"].replace(
        vocab_size=264, bos_token_id=None, eos_token_id=(258,), num_hidden_layers=2
    )
    folder = tmp_path / "m"
    hf.save_hf(folder, config, tiny_params(config), tokenizer=byte_tokenizer())
    write_tasks(tmp_path)
    settings = Settings(models=(f"m={folder}",), max_slots=4, piece_tokens=32)
    with running(
        make_build(settings),
        sources=given_sources(settings),
        models=settings.models,
        wait_ready=False,
    ) as server:
        until(lambda: server.call("/readyz")[0] == 200, seconds=240)
        arguments = {
            "model": "m",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": str(folder),
            "tokenizer_backend": "huggingface",
            "num_concurrent": "4",
        }
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
                *("--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())),
                *("--tasks", "choosing,writing", "--include_path", str(tmp_path)),
                *("--log_samples", "--output_path", str(tmp_path / "out")),
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    model = load(folder)
    for row, sample in zip(ROWS, samples_of(tmp_path / "out", "choosing"), strict=True):
        for choice, response in zip(row["choices"], sample["filtered_resps"], strict=True):
            whole = row["question"] + choice
            # A byte a token: the last ones are the choice.
            (scored,) = generate(model, [whole], max_tokens=0, echo=True, logprobs=0)
            own = [each.logprob for each in scored.prompt_logprobs[len(row["question"]) :]]
            np.testing.assert_allclose(float(response[0]), sum(own), atol=1e-4)
    for row, sample in zip(ROWS, samples_of(tmp_path / "out", "writing"), strict=True):
        (expected,) = generate(model, [row["question"]], temperature=0, max_tokens=12)
        assert sample["filtered_resps"][0].strip() == expected.text.strip()
