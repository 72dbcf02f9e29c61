"""The doctor's checks on facts written down here, and one examination of this machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from llama_jax import doctor
from llama_jax.commands import doctor as command

CPU = {"platform": "cpu", "kind": "cpu", "id": 0}


def test_versions_missing_old_and_right() -> None:
    needs = [Requirement("jax>=0.10.2"), Requirement("flax>=0.12"), Requirement("optax>=0.2")]
    problems = doctor.check_versions(
        "llama-jax", needs, {"jax": None, "flax": "0.11.9", "optax": "0.2.8"}
    )
    assert [problem.what for problem in problems] == [
        "llama-jax needs jax>=0.10.2: not installed",
        "llama-jax needs flax>=0.12: 0.11.9 is installed",
    ]
    assert problems[1].mend == "pip install 'flax>=0.12'"
    assert all(problem.fatal for problem in problems)


def test_a_jaxlib_that_does_not_match_jax_is_named() -> None:
    jaxlib = [need for need in doctor.requirements("jax") if need.name == "jaxlib"][:1]
    assert jaxlib, "jax declares which jaxlib it runs with"
    problems = doctor.check_versions("jax", jaxlib, {"jaxlib": "0.1.0"})
    assert "0.1.0 is installed" in problems[0].what
    assert "jaxlib" in problems[0].mend


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "count"),
    [
        ("x86_64", "flags\t: fpu sse2 avx avx2\n", 0),
        ("x86_64", "flags\t: fpu sse2 avx512f\n", 1),
        ("x86_64", "", 0),
        ("aarch64", "Features\t: fp asimd\n", 0),
    ],
)
def test_avx(machine: str, cpuinfo: str, count: int) -> None:
    problems = doctor.check_processor(machine, cpuinfo)
    assert len(problems) == count
    assert all("AVX" in problem.what and problem.fatal for problem in problems)


def test_an_accelerator_that_jax_does_not_use() -> None:
    found = doctor.check_accelerators([CPU], has_tpu=True, has_gpu=False, platforms=None)
    assert "llama-jax[tpu]" in found[0].mend
    found = doctor.check_accelerators([CPU], has_tpu=False, has_gpu=True, platforms="cpu")
    assert "unset" in found[0].mend and "JAX_PLATFORMS=cpu" in found[0].mend
    tpu = {"platform": "tpu", "kind": "TPU v5 lite", "id": 0}
    assert not doctor.check_accelerators([tpu], has_tpu=True, has_gpu=False, platforms=None)
    assert not doctor.check_accelerators([CPU], has_tpu=False, has_gpu=False, platforms=None)


def test_the_tpu_lock_is_recognised() -> None:
    message = "RuntimeError: The TPU is already in use (libtpu lockfile /tmp/libtpu_lockfile)"
    found = doctor.check_tpu_lock(message, lock=Path("/tmp/libtpu_lockfile"))
    assert "another process holds the TPU" in found[0].what
    assert "lsof /tmp/libtpu_lockfile" in found[0].mend
    assert not doctor.check_tpu_lock("ValueError: no", lock=Path("/tmp/libtpu_lockfile"))


def test_disk_and_cache(tmp_path: Path) -> None:
    assert not doctor.check_disk("x", tmp_path, doctor.MIN_FREE_BYTES)
    found = doctor.check_disk("the compilation cache", tmp_path, 5 * 1024**2)
    assert "only 5 MiB are free for the compilation cache" in found[0].what
    assert "off" in doctor.check_cache(None)[0].what
    # A folder that does not exist yet is judged by the one it will be made in.
    written = [p.what for p in doctor.check_cache(tmp_path / "a" / "b") if "written" in p.what]
    assert written == []


def test_devices_are_asked_for_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(code: int, out: str, err: str) -> Any:
        return lambda *a, **k: subprocess.CompletedProcess(a, code, out, err)

    monkeypatch.setattr(doctor.subprocess, "run", answer(0, json.dumps([CPU]), ""))
    assert doctor.ask_devices(1.0) == ([CPU], [])
    error = "Traceback\nModuleNotFoundError: No module named 'jax'"
    monkeypatch.setattr(doctor.subprocess, "run", answer(1, "", error))
    devices, problems = doctor.ask_devices(1.0)
    assert devices == []
    assert "No module named 'jax'" in problems[0].what
    assert problems[0].mend == "pip install llama-jax"

    def hang(*args: Any, **kwargs: Any) -> Any:
        raise subprocess.TimeoutExpired("python", kwargs["timeout"])

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert "within 3 s" in doctor.ask_devices(3.0)[1][0].what


def test_an_examination_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_marker")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = doctor.examine(cache_dir=tmp_path / "cache")
    assert found.ok, found.problems
    assert [device["platform"] for device in found.devices] == ["cpu"]
    assert found.versions["jax"] == __import__("jax").__version__
    assert found.python == sys.version.split()[0]
    assert found.environment["HF_TOKEN"] == "***"
    assert found.cache_dir == str(tmp_path / "cache")
    report = found.to_json()
    assert "hf_marker" not in json.dumps(report)
    assert report["ok"] is True

    report["problems"] = [{"what": "no AVX", "mend": "another machine", "fatal": True}]
    command.show(report, None)  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert "1 x cpu" in shown and "wrong: no AVX" in shown and "mend: another machine" in shown
