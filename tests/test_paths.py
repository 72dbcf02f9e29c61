"""Home folders in paths that no shell has read."""

import pytest

import llama_jax as lj
from llama_jax.commands.startup import cache_dir
from llama_jax.paths import to_path
from llama_jax.weights.merge_recipe import read_recipe
from train.data.files import read_files

UNKNOWN = r"'~nobody-here/x.*' begins with a home folder that is not known here"


def test_a_home_folder_is_looked_up(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_path("~/a") == tmp_path / "a"
    assert str(to_path("a~/b")) == "a~/b"


@pytest.mark.parametrize(
    "use",
    [
        to_path,
        lj.load,
        lambda path: list(read_files(f"{path}.jsonl")),
        lambda path: read_recipe({"method": "slerp", "models": [path, path], "t": 0.5}, "recipe"),
    ],
)
def test_one_that_is_not_known_is_named(use):
    with pytest.raises(ValueError, match=UNKNOWN):
        use("~nobody-here/x")


def test_the_cache_of_programs_says_so_too(monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE_DIR", "~nobody-here/x")
    with pytest.raises(ValueError, match=UNKNOWN):
        cache_dir()
