"""Small files of a run folder: the samples of each step, and the lock."""

import errno
import fcntl
import json
import subprocess
import sys

import pytest

from tests.train.command import ROOT
from tests.train.test_loop import config
from train.attempts import Attempts
from train.lock import locked
from train.loop import train
from train.run_dir import open_run_dir, write_config
from train.samples_log import SamplesLog, read_samples

pytestmark = pytest.mark.compiled_quickly


def test_samples_are_kept_up_to_the_step_that_training_goes_on_from(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    with SamplesLog(path, resume_step=0) as log:
        for step in (1, 2, 3):
            log.write(step, [step, 10 + step])
            assert read_samples(path)[-1] == {"step": step, "samples": [step, 10 + step]}
    with path.open("a") as file:
        file.write('{"step": 4, "sam')  # cut off by a crash
    assert [entry["step"] for entry in read_samples(path)] == [1, 2, 3]
    with SamplesLog(path, resume_step=2) as log:
        log.write(3, [7])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "samples": [1, 11]},
        {"step": 2, "samples": [2, 12]},
        {"step": 3, "samples": [7]},
    ]


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    script = "import sys; from pathlib import Path; from train.lock import locked\n"
    script += "with locked(Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    options = {"check": False, "capture_output": True, "text": True, "cwd": ROOT}
    with locked(tmp_path / "run"):
        other = subprocess.run(command, **options)
        assert other.returncode == 1
        assert "is in use by another process, which trains there" in other.stderr
    assert subprocess.run(command, **options).returncode == 0


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EACCES])
def test_a_file_system_without_locks_is_only_warned_of(tmp_path, monkeypatch, caplog, code):
    def fail(*args):
        raise OSError(code, "no")

    monkeypatch.setattr(fcntl, "flock", fail)
    if code == errno.EACCES:
        with pytest.raises(OSError, match="no"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            assert "knows no locks" in caplog.text


def test_a_folder_that_a_run_was_killed_in_before_it_began_is_a_new_one(tmp_path):
    run = config(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", "config.json.tmp"):
        (folder / name).write_text("")
        assert open_run_dir(run)[0].path == folder
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        open_run_dir(run)


def test_a_folder_whose_config_is_refused_by_now_says_what_to_change_in_which_file(tmp_path):
    run = config(tmp_path)
    folder = open_run_dir(run)[0]
    write_config(folder, run)
    written = json.loads(folder.config.read_text())
    written["schedule"] |= {"decay_steps": 0, "final_ratio": 0.5}
    folder.config.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"schedule.final_ratio was 0.5 and is 0.0") as raised:
        open_run_dir(run)
    assert "refused by now: schedule.final_ratio is 0.5, but decay_steps is 0" in str(raised.value)
    assert f"write into {folder.config} what the config says now" in str(raised.value)
    written["schedule"] = run.to_dict()["schedule"]
    folder.config.write_text(json.dumps(written))
    assert open_run_dir(run)[0] == folder
    changed = run.replace(train=run.train.replace(steps=9))
    with pytest.raises(ValueError, match="the config of that run$"):
        open_run_dir(changed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{bad\n{"step": 1}\n', "line 1: not JSON"),
        ("[1]\n", "line 1: an entry is an object with its step"),
        ('{"step": 1}\n{"step": "2"}\n', "line 2: an entry is"),
        ("[" * 100_000 + "\n", "nested too deeply"),
    ],
)
def test_damaged_files_of_a_run_are_named(tmp_path, text, said):
    path = tmp_path / "samples.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"samples.jsonl, .*{said}"):
        SamplesLog(path, resume_step=3)
    assert path.read_text() == text  # nothing is lost


def test_a_url_is_no_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = config(tmp_path).replace(output="gs://bucket/run")  # as `launch` and `fit` take it
    with pytest.raises(ValueError, match="output is gs://bucket/run; .*`llama-jax launch`"):
        train(run)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_damaged_settings_of_a_run_are_named(tmp_path):
    run = config(tmp_path)
    attempt = {"began": 1, "first_step": 0, "last_step": 1, "wall_seconds": 1}
    for name, text in (
        ("config.json", "{"),
        ("goodput.json", "[]"),
        ("goodput.json", "{}"),
        ("goodput.json", '{"attempts": [{}]}'),
        ("goodput.json", json.dumps({"attempts": [{**attempt, "seconds": {"step": "1"}}]})),
        ("goodput.json", json.dumps({"attempts": [{**attempt, "seconds": {"naps": 1}}]})),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError, match=name):
            if name == "config.json":
                open_run_dir(run.replace(output=str(tmp_path)))
            else:
                Attempts(path, first_step=0)


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    """No shell has read a run config; elsewhere in it the sign means the same."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder, _ = open_run_dir(config(tmp_path, output="~/runs/a"))
    assert folder.path == tmp_path / "runs" / "a"


def test_an_output_in_a_file_is_refused_before_rows_are_read(tmp_path):
    (tmp_path / "notes").write_text("x")
    with pytest.raises(ValueError, match=r"notes/a lies in .*notes, which is a file"):
        open_run_dir(config(tmp_path, output=str(tmp_path / "notes" / "a")))
