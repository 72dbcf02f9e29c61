"""The run config of a command: CONFIG.yaml, a file or a shipped one, and key=value overrides."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def load(args: argparse.Namespace) -> "RunConfig":
    """Raises ValueError for a config that is not there or is wrong."""
    from train.config import load_run_config

    return load_run_config(find_config(args.config), args.overrides)


def configs_folder() -> Path:
    """Where the shipped configs lie: inside the package of a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The file `name`, or the shipped config of that name (`configs/` before it may be left out).

    Raises ValueError naming the shipped ones.
    """
    return _find("the run config", name, configs_folder(), (Path(), Path("configs")))


def find_serve_config(name: str) -> Path:
    """The same for the settings of a server, which are shipped in `configs/serve/`."""
    places = (Path(), Path("serve"), Path("configs/serve"))
    return _find("the serve config", name, configs_folder() / "serve", places)


def find_merge_recipe(name: str) -> Path:
    """The same for a recipe of `llama-jax merge`, which are shipped in `configs/merge/`."""
    places = (Path(), Path("merge"), Path("configs/merge"))
    return _find("the recipe", name, configs_folder() / "merge", places)


def _find(what: str, name: str, folder: Path, places: tuple[Path, ...]) -> Path:
    if not name.strip():
        raise ValueError(f"the name of {what} is empty; give a YAML file")
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.name: file for file in sorted(folder.glob("*.yaml"))}
    if path.name in shipped and path.parent in places:
        return shipped[path.name]
    why = "is a folder" if path.is_dir() else "does not exist"
    raise ValueError(f"{what} {name} {why}; give a YAML file or one of {', '.join(shipped)}")
