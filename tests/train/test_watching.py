"""What a run shows: generations, a trace, Weights & Biases, where the time went, the report."""

import contextlib
import importlib.machinery
import json
import sys
import types
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llama_jax.commands.samples import sample
from tests.train.test_loop import ONE_DEVICE, config
from train import loop, profiler, weights_and_biases
from train.generations import GenerationsLog, read_generations
from train.loop import train
from train.metrics import read_metrics
from train.profiler import Profiler, TracedSteps, read_steps
from train.sections.wandb import WandbSection
from train.weights_and_biases import WandbRun, check_installed

pytestmark = pytest.mark.compiled_quickly

PROMPTS = ["what is", "<b>it"]


class Stub(types.ModuleType):
    """A package `wandb` that writes down what it is asked for."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.asked, self.logged, self.codes = [], [], []
        self.summary = {}

    def init(self, **options):
        self.asked.append(options)
        return self

    def log(self, numbers, *, step):
        self.logged.append((step, numbers))

    def finish(self, *, exit_code):
        self.codes.append(exit_code)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run that shows all it can, and what Weights & Biases was told."""
    stub, seen = Stub(), []
    before = sys.modules.get("wandb")
    sys.modules["wandb"] = stub
    try:
        run = config(
            tmp_path_factory.mktemp("watched"),
            mesh=ONE_DEVICE,
            train__sample_prompts=PROMPTS,
            train__sample_max_tokens=5,
            wandb={"project": "tests", "mode": "offline"},
        )
        result = train(
            run,
            progress=lambda step, total, entry: seen.append((step, total, dict(entry))),
            sampler=sample,
            profile=read_steps("2-3"),
        )
    finally:
        if before is None:
            del sys.modules["wandb"]
        else:
            sys.modules["wandb"] = before
    return run, result, stub, seen


def test_generations_are_written_at_each_evaluation_and_are_the_models(watched):
    run, result, _, _ = watched
    said = read_generations(result.run_dir / "generations.jsonl")
    assert [(e["step"], e["prompt"]) for e in said] == [(s, p) for s in (3, 6) for p in PROMPTS]
    from infer.generate import generate

    model = (result.config, result.params, result.tokenizer)
    again = generate(model, PROMPTS, temperature=0.0, max_tokens=5, compute=run.compute)
    assert [e["text"] for e in said if e["step"] == 6] == [output.text for output in again]


def test_the_trace_is_of_the_steps_asked_for(watched):
    _, result, _, _ = watched
    assert list((result.run_dir / "profile").rglob("*.xplane.pb"))


def test_progress_gets_what_metrics_hold(watched):
    _, result, _, seen = watched
    entries = read_metrics(result.run_dir / "metrics.jsonl")
    assert [(step, total) for step, total, _ in seen] == [(n, 6) for n in range(1, 7)]
    assert [entry for _, _, entry in seen] == entries
    assert "mfu" not in entries[0], "the peak of a CPU is not known"


def test_weights_and_biases_is_told_the_same(watched):
    run, result, stub, _ = watched
    (asked,) = stub.asked
    assert (asked["project"], asked["mode"], asked["resume"]) == ("tests", "offline", "allow")
    assert asked["name"] == "run" and asked["config"] == run.to_dict()
    entries = read_metrics(result.run_dir / "metrics.jsonl")
    assert [step for step, _ in stub.logged] == [1, 2, 3, 4, 5, 6]
    for (_, numbers), entry in zip(stub.logged, entries, strict=True):
        assert numbers == {name: value for name, value in entry.items() if name != "step"}
    assert 0 < stub.summary["goodput"] < 1 and stub.codes == [0]


def test_the_time_is_all_accounted_for(watched):
    _, result, _, _ = watched
    written = json.loads((result.run_dir / "goodput.json").read_text())
    seconds = written["seconds"]
    assert sum(seconds.values()) == pytest.approx(written["wall_seconds"], abs=1e-6)
    for cause in ("step", "data", "eval", "save", "compile", "resume", "loop", "report"):
        assert seconds[cause] > 0, cause
    assert result.goodput["wall_seconds"] >= written["wall_seconds"]


def test_the_report_is_one_page_that_says_it_all(watched):
    run, result, _, _ = watched
    page = (result.run_dir / "report.html").read_text()
    for heading in ("Loss", "Learning rate", "Tokens per second", "Time", "Data: train",
                    "Generations", "Machine", "Config"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    for forbidden in ("<script", "http://", "https://", "src=", "<link", "@import", "<b>it"):
        assert forbidden not in page, "nothing from elsewhere, and texts are texts"
    assert "&lt;b&gt;it<mark>" in page and "evaluation loss at the end" in page
    assert "of an uninterrupted" not in page and jax.__version__ in page
    assert page.count("<details") == 2 and page.count("<details open>") == 1
    assert run.output in page


def test_a_resumed_run_goes_on_with_its_generations(tmp_path):
    run = config(tmp_path, mesh=ONE_DEVICE, train__sample_prompts=PROMPTS)
    said = iter(range(100))

    def count(run, model, mesh):
        return [f"text {next(said)}" for _ in run.train.sample_prompts]

    train(run, sampler=count, stop_after=4)
    log = tmp_path / "run/generations.jsonl"
    with log.open("a") as file:
        file.write('{"step": 5, "prompt": "p", "text": "t"}\n{"step": 6, "pr')
    train(run, sampler=count)
    texts = [(entry["step"], entry["text"]) for entry in read_generations(log)]
    assert texts == [(3, "text 0"), (3, "text 1"), (6, "text 2"), (6, "text 3")]


def test_prompts_without_one_who_answers_are_not_passed_over_in_silence(tmp_path, caplog):
    run = config(tmp_path, mesh=ONE_DEVICE, train__sample_prompts=PROMPTS, train__steps=3)
    train(run)
    assert "brings no sampler" in caplog.text
    assert not (tmp_path / "run/generations.jsonl").exists()


def test_a_prompt_alone_is_enough_to_evaluate_on(tmp_path):
    run = config(tmp_path, mesh=ONE_DEVICE, data__eval_fraction=0.0, train__sample_prompts=["a"])
    asked = []
    train(run, sampler=lambda run, model, mesh: asked.append(1) or ["b"])
    assert len(asked) == 2
    with pytest.raises(ValueError, match="or train.sample_prompts"):
        config(tmp_path, data__eval_fraction=0.0)
    with pytest.raises(ValueError, match="empty prompt"):
        config(tmp_path, train__sample_prompts=["a", ""])


def test_each_prompt_needs_its_text(tmp_path):
    log = GenerationsLog(tmp_path / "g.jsonl", resume_step=0)
    with pytest.raises(ValueError, match="shorter"):
        log.write(1, ["a", "b"], ["c"])


def test_a_config_that_wants_weights_and_biases_where_it_is_not_is_refused_at_once(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(weights_and_biases.importlib.util, "find_spec", lambda name: None)
    run = config(tmp_path, wandb={"project": "tests"})
    with pytest.raises(ValueError, match=r"pip install 'llama-jax\[wandb\]', or remove"):
        train(run)
    assert not (tmp_path / "run").exists()
    check_installed(None)
    with pytest.raises(ValueError, match=r"wandb\.project is empty"):
        WandbSection(project=" ")


def test_a_run_folder_is_one_run_there_and_a_failure_is_told(tmp_path, monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    section = WandbSection(project="p", entity="team", name="n")
    with WandbRun(section, tmp_path / "a", {}) as run:
        run.write({"step": 3, "loss": float("nan"), "lr": 0.5, "note": None})
    with pytest.raises(RuntimeError), WandbRun(section, tmp_path / "a", {}):
        raise RuntimeError
    with WandbRun(section, tmp_path / "b", {}):
        pass
    ids = [asked["id"] for asked in stub.asked]
    assert ids[0] == ids[1] != ids[2] and stub.asked[0]["entity"] == "team"
    assert stub.logged == [(3, {"lr": 0.5})] and stub.codes == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1", TracedSteps(3, 3, relative=True)),
        ("5", TracedSteps(3, 7, relative=True)),
        ("10-15", TracedSteps(10, 15)),
    ],
)
def test_steps_to_trace(text, steps):
    assert read_steps(text) == steps


@pytest.mark.parametrize("text", ["", "0", "-1", "5-4", "0-3", "a", "1-", "1-2-3"])
def test_steps_that_cannot_be_traced(text):
    with pytest.raises(ValueError, match="neither a number of steps, such as 5, nor"):
        read_steps(text)


def test_a_number_of_steps_counts_from_where_the_run_goes_on():
    assert read_steps("5").absolute(100) == TracedSteps(103, 107)
    assert read_steps("10-15").absolute(100) == TracedSteps(10, 15)


@pytest.mark.parametrize(("first", "is_said"), [(2, True), (3, False), (4, False), (5, True)])
def test_a_trace_that_would_never_begin_is_said(first, is_said, tmp_path, caplog):
    run = SimpleNamespace(train=SimpleNamespace(steps=4))
    job: Any = SimpleNamespace(
        folder=SimpleNamespace(path=tmp_path), setup=SimpleNamespace(run=run)
    )
    with contextlib.ExitStack() as stack:
        loop._open_profiler(job, TracedSteps(first, 9), 2, stack)
    assert ("among the steps 3 to 4 of this start; nothing is traced" in caplog.text) == is_said


def test_the_trace_begins_and_ends_once_even_where_the_run_ends_early(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def run(steps, count):
        calls.clear()
        traced = Profiler(tmp_path, steps)
        for step in range(1, count + 1):
            traced.before(step, None)
            calls.append(step)
            traced.after(step, {"loss": jnp.zeros(())})
        traced.stop()
        return list(calls)

    assert run(TracedSteps(2, 3), 4) == [1, "start", 2, 3, "stop", 4]
    assert run(TracedSteps(2, 9), 3) == [1, "start", 2, 3, "stop"]
    assert run(TracedSteps(7, 9), 3) == [1, 2, 3]
    assert run(None, 2) == [1, 2]
