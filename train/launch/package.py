"""What is installed on the workers: a wheel of this checkout, a wheel that is there, or a
requirement for pip."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from llama_jax import __version__
from train.launch.gcloud import CommandError, Runner, check
from train.launch.secrets import Redactor

CHECKOUT = "checkout"
_NAME = "llama-jax"


@dataclass(frozen=True)
class Package:
    """wheel: the file to copy; without one, `requirement` is for pip on the workers."""

    requirement: str
    wheel: Path | None = None


def checkout_folder() -> Path | None:
    """The checkout this program runs from, None where it was installed from a wheel."""
    root = Path(__file__).parent.parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def read_package(text: str) -> Package | None:
    """The package that --package names; None for the checkout, which has yet to be built.

    Raises ValueError for what is neither a wheel nor a requirement of this program.
    """
    if text == CHECKOUT:
        if checkout_folder() is None:
            raise ValueError(
                "this program was not started from a checkout, so there is nothing to build; give "
                "--package a wheel or a requirement, such as llama-jax==1.0"
            )
        return None
    if text.endswith(".whl"):
        if not Path(text).is_file():
            raise ValueError(f"--package {text} does not exist")
        try:
            _check_name(text, parse_wheel_filename(Path(text).name)[0])
        except InvalidWheelFilename as error:
            raise ValueError(
                f"--package {text}: pip refuses a wheel of that name: {error}"
            ) from error
        return Package(Path(text).name, Path(text))
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise ValueError(
            f"--package {text!r} is neither {CHECKOUT}, nor a wheel, nor a requirement such as "
            f"llama-jax==1.0: {error}"
        ) from error
    _check_name(text, requirement.name)
    return Package(text)


def _check_name(text: str, name: str) -> None:
    if canonicalize_name(name) != _NAME:
        raise ValueError(
            f"--package {text} is {name}; workers run `llama-jax train`, so give {CHECKOUT}, a "
            f"wheel of {_NAME}, or a requirement such as {_NAME}==1.0"
        )


def build_command(out: Path) -> list[str]:
    """The command that builds a wheel of the checkout into the folder `out`."""
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={out}",
        str(checkout_folder()),
    ]  # fmt: skip
    if importlib.util.find_spec("hatchling") is not None:
        # The build tool is there: nothing has to be fetched.
        command.insert(-1, "--no-build-isolation")
    return command


def build_wheel(runner: Runner, out: Path, redact: Redactor) -> Package:
    """Builds the checkout. In a dry run there is no wheel, only what it would be called."""
    command = build_command(out)
    check(runner, command, redact, timeout=600.0)
    if runner.is_dry:
        return Package(f"llama_jax-{__version__}-py3-none-any.whl")
    wheels = sorted(out.glob("*.whl"))
    if not wheels:
        raise CommandError(f"{' '.join(command)} made no wheel")
    return Package(wheels[-1].name, wheels[-1])
