"""Batches: nothing lost, nothing done twice, also when the run is killed."""

import asyncio
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infer.engine.request import Failed
from infer.server import build
from infer.server.batch import open_answers, read_batch, run_batch
from infer.server.build import given_sources
from infer.server.loaded import Built, Source
from infer.server.settings import Settings
from llama_jax import cli
from tests.infer.server.running import byte_tokenizer
from tests.infer.server.scripted_engine import ScriptedEngine, saying

pytestmark = pytest.mark.compiled_quickly


def line(number, **body):
    body = {"model": "m", "prompt": f"number {number}", "max_tokens": 4, **body}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer(custom_id):
    row = {"id": "batch_req_1", "custom_id": custom_id, "response": {}, "error": None}
    return json.dumps(row).encode() + b"\n"


def answers(path):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no requests"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: a request has the fields"),
        (json.dumps({**line(1), "more": 1}), "a request has the fields"),
        (json.dumps({**line(1), "custom_id": 5}), "custom_id must be a text"),
        (json.dumps({**line(1), "custom_id": "\ud800"}), "custom_id holds half a surrogate"),
        ('{"custom_id": "a", ' + json.dumps(line(1))[1:], "line 1: not JSON: 'custom_id' appears"),
        (json.dumps({**line(1), "url": "/v1/models"}), "url one of"),
        (json.dumps({**line(1), "method": "GET"}), "method must be POST"),
        (json.dumps({**line(1), "body": []}), "body must be an object"),
        (json.dumps(line(1, stream=True)), "without stream"),
        (json.dumps(line(1)) + "\n" + json.dumps(line(1)), "line 2: custom_id 'c1' comes twice"),
    ],
)
def test_a_file_that_is_no_batch_is_refused(tmp_path, text, message):
    path = tmp_path / "in.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_batch(path)


def test_an_unfinished_line_is_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    first, second = answer("a"), answer("b")
    for size in range(len(second)):
        path.write_bytes(first + second[:size])
        with open_answers(path) as (file, done):
            assert done == {"a"}
            file.write(second)
            with pytest.raises(ValueError, match="another run"), open_answers(path):
                pass
        assert [each["custom_id"] for each in answers(path)] == ["a", "b"]


@pytest.mark.parametrize(
    "content, number",
    [
        (b"something else\n", 1),
        (b"something else", 1),
        (b'{"name": "no answer"}', 1),
        (b'{"custom_id": "a"}\n', 1),
        (json.dumps(line(1)).encode() + b"\n", 1),
        (json.dumps(line(1)).encode(), 1),
        (b"[" * 100000 + b"\n", 1),
        (answer("a") + b"more", 2),
        (b"something else\n" + answer("b")[:30], 1),
    ],
)
def test_a_file_of_something_else_stays_as_it_is(tmp_path, capsys, content, number):
    source = write(tmp_path / "in.jsonl", [line(1)])
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    command = ["batch", "smollm2-135m", str(source), str(path)]
    assert cli.main(command) == cli.WRONG_INPUT
    message = f"{path}, line {number} is no answer of a batch; give another file"
    assert message in capsys.readouterr().err
    assert path.read_bytes() == content


def scripted():
    return ScriptedEngine(byte_tokenizer(), saying(byte_tokenizer(), "four"))


def built(engine=None):
    return Built(engine or scripted(), byte_tokenizer())


def run(source, target, engine):
    return asyncio.run(
        run_batch(
            source,
            target,
            settings=Settings(models=("m",)),
            build=lambda source: built(engine),
            model=Source("m", "1", "m"),
        )
    )


def test_answers_are_those_of_the_server_and_refusals_are_answers(tmp_path):
    rows = [line(n) for n in range(5)] + [line(5, temperature="hot"), line(6, model="other")]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    engine = scripted()
    counts = run(source, target, engine)
    assert (counts.total, counts.before, counts.done, counts.failed) == (7, 0, 7, 2)
    found = {each["custom_id"]: each["response"] for each in answers(target)}
    assert {each: found[each]["status_code"] for each in found} == {
        **{f"c{n}": 200 for n in range(5)}, "c5": 400, "c6": 404,
    }  # fmt: skip
    assert found["c0"]["body"]["object"] == "text_completion"
    assert found["c0"]["body"]["usage"]["completion_tokens"] > 0
    again = run(source, target, scripted())
    assert (again.before, again.done) == (7, 0)
    write(source, rows[1:])
    with pytest.raises(ValueError, match="answers 'c0', which"):
        run(source, target, scripted())


def test_a_request_that_the_engine_fails_at_is_answered_with_its_error(tmp_path):
    rows = [line(0, seed=7), line(1), line(2)]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    engine = scripted()
    submit = engine.submit

    def submit_or_fail(request, on_event):
        if request.params.seed == 7:
            on_event(Failed("engine", "no token can be chosen"))
        else:
            submit(request, on_event)

    engine.submit = submit_or_fail
    counts = run(source, target, engine)
    assert (counts.done, counts.failed) == (3, 1)
    found = {each["custom_id"]: each["response"] for each in answers(target)}
    assert {each: found[each]["status_code"] for each in found} == {"c0": 500, "c1": 200, "c2": 200}
    assert found["c0"]["body"]["error"]["code"] == "engine_failed"
    assert run(source, target, engine).done == 0


def test_a_full_disk_ends_the_run_and_another_goes_on(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "in.jsonl", [line(n) for n in range(40)])
    target = tmp_path / "out.jsonl"
    room = [5000]

    class Disk(io.FileIO):
        """Takes what there is room for."""

        def write(self, data):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = super().write(data[: room[0]])
            room[0] -= written
            return written

    usual = Path.open

    def opened(path, mode="r", *more, **options):
        return Disk(path, "a+") if mode == "a+b" else usual(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(build, "given_sources", lambda settings: [Source("m", "1", "m")])
    monkeypatch.setattr(build, "make_build", lambda settings: lambda source: built())
    assert cli.main(["batch", "m", str(source), str(target)]) == cli.FAILED
    *_, said = capsys.readouterr().err.splitlines()
    assert said == f"llama-jax batch: error: {target}: No space left on device"
    before = target.read_bytes()
    done = len(answers(target))
    assert 0 < done < 40 and before.endswith(b"\n") and len(before) < 5000
    room[0] = 10**6
    assert run(source, target, scripted()).before == done
    assert target.read_bytes().startswith(before)
    assert len({each["custom_id"] for each in answers(target)}) == len(answers(target)) == 40


def test_what_is_no_file_is_refused(tmp_path):
    source = write(tmp_path / "in.jsonl", [line(0)])
    with pytest.raises(ValueError, match="/dev/full is a device or a pipe; give a file"):
        run(source, Path("/dev/full"), scripted())


def test_an_engine_that_breaks_ends_the_run(tmp_path):
    source, target = write(tmp_path / "in.jsonl", [line(0), line(1)]), tmp_path / "out.jsonl"
    engine = scripted()
    submit = engine.submit

    def submit_and_break(request, on_event):
        submit(request, on_event)
        if request.id != "probe":
            engine.break_down()

    engine.step_seconds = 0.05
    engine.submit = submit_and_break
    with pytest.raises(RuntimeError, match="was not answered: .*boom"):
        run(source, target, engine)
    assert answers(target) == []
    assert run(source, target, scripted()).done == 2


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    from tests.infer.server.batch_kill import NUM_REQUESTS

    source = write(tmp_path / "in.jsonl", [line(n) for n in range(NUM_REQUESTS)])
    target = tmp_path / "out.jsonl"
    asked = tmp_path / "asked.txt"
    command = [sys.executable, "-m", "tests.infer.server.batch_kill", source, target, asked]
    kills = 0
    for _ in range(30):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ) as process:
            before = target.stat().st_size if target.exists() else 0
            while process.poll() is None:
                if kills < 2 and target.exists() and target.stat().st_size > before + 2000:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills == 2 and process.returncode == 0
    ids = [each["custom_id"] for each in answers(target)]
    assert sorted(ids) == sorted(f"c{n}" for n in range(NUM_REQUESTS))  # none lost, none twice
    assert all(each["response"]["status_code"] == 200 for each in answers(target))
    # What had been answered was not asked again: only what was under way at a kill was.
    assert (
        len(asked.read_text().splitlines())
        <= NUM_REQUESTS + kills * 2 * Settings(models=("m",)).max_slots
    )


def test_a_model_that_is_wrong_is_the_callers_to_mend(tmp_path):
    source, target = write(tmp_path / "in.jsonl", [line(0)]), tmp_path / "out.jsonl"

    def broken(source):
        raise ValueError("config.json says nothing")

    with pytest.raises(ValueError, match="config.json says nothing"):
        asyncio.run(
            run_batch(
                source,
                target,
                settings=Settings(models=("m",)),
                build=broken,
                model=Source("m", "1", "m"),
            )
        )
    assert not target.exists()


def test_a_folder_that_is_not_there_is_refused_before_the_model_is_loaded(tmp_path):
    source = write(tmp_path / "in.jsonl", [line(0)])
    with pytest.raises(ValueError, match="nowhere is no folder that you may write in"):
        run(source, tmp_path / "nowhere" / "out.jsonl", engine=None)


def test_what_is_no_model_is_refused_before_anything_starts(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [line(0)])
    nowhere = str(tmp_path / "nowhere")
    assert cli.main(["batch", nowhere, str(source), str(tmp_path / "out")]) == cli.WRONG_INPUT
    assert "is neither there nor a name that is known" in capsys.readouterr().err
    for name in ("", "a/b/c", "model.gguf"):
        with pytest.raises(ValueError, match="neither there nor a name"):
            given_sources(Settings(models=(f"m={name}",)))
    given_sources(Settings(models=("m=org/name", str(tmp_path))))
