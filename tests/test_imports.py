"""Who may import whom, and that importing settles nothing."""

import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import infer
import llama_jax
import train

ROOT = Path(__file__).parent.parent
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
HEAVY = ("jax", "flax", "transformers", "numpy", "orbax", "grain", "optax", "rich", "yaml", "torch")


def run_python(program: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def modules() -> list[str]:
    names = []
    for package in (llama_jax, train, infer):
        names.append(package.__name__)
        found = pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")
        names += [module.name for module in found if not module.name.endswith("__main__")]
    return names


def test_import_directions_hold() -> None:
    lint = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr
    assert "0 broken" in lint.stdout


def test_a_wrong_direction_is_noticed(tmp_path: Path) -> None:
    # The contracts themselves, tried on a tree that breaks three of them.
    for package in ("llama_jax", "llama_jax/model", "train", "infer"):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "llama_jax/config.py").write_text("import llama_jax.model\n")
    (tmp_path / "llama_jax/model/moe.py").write_text("import flax\n")
    (tmp_path / "infer/generate.py").write_text("import train\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    lint = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert lint.returncode != 0
    assert "3 broken" in lint.stdout, lint.stdout + lint.stderr


@pytest.mark.parametrize("module", ["llama_jax", "llama_jax.cli", "llama_jax.config"])
def test_the_door_stays_light(module: str) -> None:
    program = f"import sys, {module}; print([n for n in {HEAVY!r} if n in sys.modules])"
    assert run_python(program).strip() == "[]"


def test_every_module_imports_without_touching_devices_or_environment() -> None:
    names = [name for name in modules() if name != "llama_jax.cli"]
    program = (
        "import json, os\n"
        "from importlib import import_module\n"
        "before = dict(os.environ)\n"
        f"for name in {names!r}: import_module(name)\n"
        "from jax._src import xla_bridge\n"
        # Some dependencies set variables of their own while they are imported.
        "ours = ('JAX_', 'XLA_', 'LLAMA_JAX_', 'TPU_', 'LIBTPU_')\n"
        "new = [k for k, v in os.environ.items() if before.get(k) != v]\n"
        "changed = [k for k in new if k.startswith(ours)]\n"
        # What is installed beside us and not needed would only make a start longer.
        "import sys\n"
        "foreign = [n for n in ('torch', 'tensorflow', 'boto3') if n in sys.modules]\n"
        "print(json.dumps([xla_bridge.backends_are_initialized(), changed, foreign]))\n"
    )
    assert json.loads(run_python(program).splitlines()[-1]) == [False, [], []]


def test_what_tensorboard_is_kept_from_can_be_imported_afterwards() -> None:
    run_python("import train.tensorboard, torch, google.cloud.storage")


def test_no_module_needs_torch_or_tensorflow() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'tensorflow'): sys.modules[name] = None\n"
        "from importlib import import_module\n"
        f"for name in {modules()!r}: import_module(name)\n"
    )
    run_python(program)


def test_public_names_are_found_and_unknown_ones_refused() -> None:
    for name in llama_jax.__all__:
        assert getattr(llama_jax, name) is getattr(import_module(llama_jax._HOMES[name]), name)
    assert set(llama_jax.__all__) == set(llama_jax._HOMES)
    assert set(llama_jax.__all__) <= set(dir(llama_jax))
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; it offers .*load"):
        _ = llama_jax.lod


def test_a_submodule_never_hides_the_public_name_it_shares() -> None:
    program = (
        "import llama_jax.presets, llama_jax as lj\n"
        "assert isinstance(lj.presets, dict)\n"
        "import llama_jax.load\n"
        "assert callable(lj.load)\n"
        "assert llama_jax.config.ModelConfig is lj.ModelConfig\n"
    )
    run_python(program)


def test_every_module_of_the_library_has_a_place_in_the_order() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    placed = {name.strip(" ()") for layer in layers for name in re.split("[|:]", layer)}
    for name in modules():
        if name.count(".") == 1 and name.startswith("llama_jax.") and name != "llama_jax.weights":
            assert name in placed, f"{name} is missing from the layers in pyproject.toml"
        if name.startswith("llama_jax.weights."):
            assert name in placed, f"{name} is missing from the layers in pyproject.toml"
