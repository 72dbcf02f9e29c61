"""The folder that is copied to every worker: config, script, package, environment, local files."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.launch.gcloud import Runner
from train.launch.package import Package, build_wheel
from train.launch.places import Placed
from train.launch.secrets import HIDDEN, Environment, Redactor
from train.launch.workers import SCRIPT, job_variables, script

_DEMO_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Cargo:
    """What a job needs on its workers. package: None for the checkout, yet to be built."""

    placed: Placed
    environment: Environment
    package: Package | None

    @property
    def config_text(self) -> str:
        return json.dumps(self.placed.config, indent=2) + "\n"

    @property
    def config_id(self) -> str:
        """Tells runs apart: which config is training on a machine."""
        return hashlib.sha256(self.config_text.encode()).hexdigest()[:16]

    @property
    def extras(self) -> str:
        """What the workers install beside the base: the TPU runtime, and what the config uses."""
        config = self.placed.config
        models = [config["model"]["name"], config["model"]["tokenizer"]]
        if config["distill"] is not None:
            models.append(config["distill"]["teacher"])
        sources = [*config["data"]["train"], *config["data"]["eval"]]
        uses = {
            "demo": _DEMO_MODEL in models,
            "data": any(map(_needs_data, sources)),
            "wandb": config["wandb"] is not None,
        }
        return ",".join(["tpu", *(name for name, used in uses.items() if used)])

    def texts(self, package: str, project: str) -> dict[str, str]:
        """The small files by name; none holds a secret."""
        return {
            "config.json": self.config_text,
            "job.env": job_variables(
                self.placed, package=package, extras=self.extras, config_id=self.config_id
            ),
            "environment.sh": self.environment.script(project),
            SCRIPT: script(),
        }


def _needs_data(source: Any) -> bool:
    """Whether a source of rows is one of those that the extra `data` brings."""
    if isinstance(source, str):
        return source.endswith(".parquet") or "://" in source
    return any(
        (key in ("tfds", "datasets") and value) or (isinstance(value, str) and _needs_data(value))
        for key, value in source.items()
    )


def stage(cargo: Cargo, folder: Path, *, project: str, runner: Runner, redact: Redactor) -> None:
    """Fills `folder`, which only its owner may read. A dry run shows what would be in it."""
    if runner.is_dry:
        runner.run(["mkdir", "-p", "-m", "700", str(folder)])
    else:
        folder.mkdir(mode=0o700, parents=True)
    package = cargo.package
    if package is None:
        runner.note("a wheel of this checkout")
        package = build_wheel(runner, folder, redact)
    elif package.wheel is not None:
        _copy(runner, package.wheel, folder / package.wheel.name)
    for name, text in cargo.texts(package.requirement, project).items():
        runner.show_file(str(folder / name), text)
        if not runner.is_dry:
            (folder / name).write_text(text, encoding="utf-8")
    if cargo.environment.forwarded:
        secret = folder / "forwarded.sh"
        names = "".join(f"export {name}={HIDDEN}\n" for name in cargo.environment.forwarded)
        runner.show_file(str(secret), names)
        if not runner.is_dry:
            secret.touch(mode=0o600)
            secret.write_text(cargo.environment.forwarded_script(), encoding="utf-8")
    if runner.is_dry and cargo.placed.copies:
        folders = sorted({str((folder / name).parent) for name in cargo.placed.copies})
        runner.run(["mkdir", "-p", *folders])
    for name, source in cargo.placed.copies.items():
        _copy(runner, source, folder / name)


def _copy(runner: Runner, source: Path, target: Path) -> None:
    if runner.is_dry:
        # -L: the files that links stand for, as below.
        runner.run(["cp", "-rL", "--", str(source), str(target)])
        return
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
