"""A folder appears whole or not at all, and nothing that was there is lost."""

import contextlib
import errno
import os
import resource
import subprocess
import sys

import pytest

from llama_jax.formats.atomic import DESCRIPTIONS, atomic_folder, check_target
from llama_jax.formats.checkpoint import save_model, save_streamed
from llama_jax.formats.gguf import save_gguf
from llama_jax.formats.hf import load_hf, save_hf
from tests.tiny import tiny_config, tiny_params


def _write(folder, text, name="config.json"):
    (folder / name).write_text(text)


def test_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        _write(folder, "{}")
        assert folder.parent == target.parent and not target.exists()
    assert (target / "config.json").read_text() == "{}"
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


def test_R19_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        _write(folder, "{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_folders(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_folder(target) as folder:  # empty: taken over
        _write(folder, "1")
    with pytest.raises(ValueError, match="not empty"), atomic_folder(target):
        pass
    with atomic_folder(target, overwrite=True) as folder:
        _write(folder, "2")
    assert (target / "config.json").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_every_kind_of_model_can_be_overwritten(tmp_path, name):
    target = tmp_path / "out"
    target.mkdir()
    _write(target, "old", name)
    with atomic_folder(target, overwrite=True) as folder:
        _write(folder, "new", name)
    assert (target / name).read_text() == "new"


def test_overwriting_never_deletes_what_is_no_model(tmp_path):
    target = tmp_path / "home"
    target.mkdir()
    _write(target, "dear", "diary.txt")
    with pytest.raises(ValueError, match="not a model"), atomic_folder(target, overwrite=True):
        pass
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file"), atomic_folder(file, overwrite=True):
        pass
    assert (target / "diary.txt").read_text() == "dear" and file.read_text() == "x"


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    _write(target, "old")
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as folder:
        _write(folder, "new")
        raise RuntimeError
    assert (target / "config.json").read_text() == "old"

    rename = os.rename

    def broken(source, destination):
        if ".tmp-" in str(source):
            raise OSError("disk full")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="disk full"), atomic_folder(target, overwrite=True) as folder:
        _write(folder, "new")
    assert (target / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_target_that_fills_up_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="not empty"), atomic_folder(target) as folder:
        _write(folder, "ours")
        target.mkdir()
        _write(target, "theirs")
    assert (target / "config.json").read_text() == "theirs"


def test_a_link_is_followed(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    with atomic_folder(link) as folder:
        _write(folder, "{}")
    assert link.is_symlink() and (real / "config.json").exists()


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_a_training_run_is_never_overwritten(tmp_path, name):
    run = tmp_path / "run"
    (run / name).mkdir(parents=True)
    _write(run, '{"method": "lora"}')
    with pytest.raises(ValueError, match=f"holds {name}, so it is a training run"):  # noqa: SIM117
        with atomic_folder(run, overwrite=True):
            pass
    assert (run / name).exists() and (run / "config.json").exists()


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("file/out", "file/deep/out"):
        with pytest.raises(ValueError, match="out lies in .*/file, which is a file"):
            check_target(tmp_path / place, overwrite=False)


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """The system refuses to write longer files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["hf", "gguf", "streamed"])
def test_what_cannot_be_written_is_named(tmp_path, kind):
    config = tiny_config()
    params = tiny_params(config)
    source, target = tmp_path / "source", tmp_path / "out.gguf"
    save_hf(source, config, params)
    write = {
        "hf": lambda: save_hf(target, config, params),
        "gguf": lambda: save_gguf(target, config, params, None),
        "streamed": lambda: save_streamed(target, lambda into: (*load_hf(source, into=into), None)),
    }[kind]
    with pytest.raises(OSError) as raised, files_of_at_most(20_000):
        write()
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(target)
    assert list(tmp_path.iterdir()) == [source]


def save_in_little_room(target):
    """What a process does whose array store goes on in threads when it has failed."""
    config = tiny_config()
    params = tiny_params(config)
    with files_of_at_most(20_000):
        try:
            save_model(target, config, params, None)
        except OSError as error:
            assert (error.errno, error.filename) == (errno.EFBIG, target)
            sys.exit(75)


def test_what_cannot_be_written_of_a_checkpoint_is_named(tmp_path):
    call = f"import {__name__} as test; test.save_in_little_room({str(tmp_path / 'out')!r})"
    ended = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert ended.returncode == 75, ended.stderr
    assert not list(tmp_path.iterdir())
