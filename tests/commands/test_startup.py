"""The compilation cache and emulated devices, each in a process of its own where it must be."""

import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.commands import startup


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": "", "HOME": environment.pop("HOME", "/nowhere")}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**base, **environment},
        cwd=Path(__file__).parent.parent.parent,
    )


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE_DIR", str(tmp_path))
    folder = startup.cache_dir()
    assert folder is not None and folder.parent == tmp_path
    assert folder.name.startswith("jaxlib-")
    monkeypatch.setenv("LLAMA_JAX_CACHE_DIR", "off")
    assert startup.cache_dir() is None
    monkeypatch.setenv("LLAMA_JAX_CACHE_DIR", " ")
    with pytest.raises(ValueError, match="LLAMA_JAX_CACHE_DIR is empty"):
        startup.cache_dir()
    monkeypatch.delenv("LLAMA_JAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = startup.cache_dir()
    assert folder is not None and folder.parent == tmp_path / "xdg" / "llama-jax"


def test_each_kind_of_processor_has_its_own_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE_DIR", str(tmp_path))
    here = startup.cache_dir()
    (tmp_path / "cpuinfo").write_text("flags : fpu avx\n")
    monkeypatch.setattr(startup, "CPUINFO", tmp_path / "cpuinfo")
    assert startup.cache_dir() != here


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    program = (
        "from llama_jax.commands.startup import start_jax\n"
        "import llama_jax.commands.startup as startup\n"
        "startup.MIN_COMPILE_SECONDS = 0.0\n"
        "start_jax(cpu_devices=2)\n"
        "import jax, jax.numpy as jnp\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda name, **k: hits.append(name))\n"
        "jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()\n"
        "print(jax.device_count(), sum('cache_hits' in name for name in hits))\n"
    )
    first = run_python(program, LLAMA_JAX_CACHE_DIR=str(tmp_path))
    assert first.stdout.split() == ["2", "0"], first.stderr
    assert list(tmp_path.rglob("*-cache"))
    second = run_python(program, LLAMA_JAX_CACHE_DIR=str(tmp_path))
    assert second.stdout.split()[0] == "2" and int(second.stdout.split()[1]) >= 1, second.stderr


def test_too_late_or_too_few_devices_is_said() -> None:
    with pytest.raises(ValueError, match="at least 1 CPU device"):
        startup.start_jax(cpu_devices=0)
    late = run_python(
        "import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()\n"
        "from llama_jax.commands.startup import start_jax\n"
        "start_jax(cpu_devices=3)\n",
        LLAMA_JAX_CACHE_DIR="off",
    )
    assert "JAX runs with 1 CPU devices, 3 were asked for" in late.stderr


def test_emulated_devices_wait_for_each_other() -> None:
    program = (
        "from llama_jax.commands.startup import start_jax\n"
        "start_jax(cpu_devices=2)\n"
        "import os\n"
        "print(os.environ['XLA_FLAGS'])\n"
    )
    given = "--xla_cpu_collective_call_terminate_timeout_seconds=7"
    answer = run_python(program, LLAMA_JAX_CACHE_DIR="off", XLA_FLAGS=given)
    flags = answer.stdout.split()
    # What the user set stays, what is missing is added, and XLA knows both names (it ends the
    # process otherwise).
    assert flags == [given, "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120"]
