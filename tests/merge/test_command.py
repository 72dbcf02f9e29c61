"""The command `merge`: its report, its memory, and what it refuses."""

import json
import subprocess
import sys

import yaml

from llama_jax import cli
from llama_jax.formats.hf import load_hf
from tests.merge.folders import tensors


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_reports_and_refuses(tmp_path, three, capsys):
    recipe = tmp_path / "recipe.yaml"
    values = {"method": "ties", "base": three[0], "models": three[1:], "density": 0.5}
    recipe.write_text(yaml.safe_dump({**values, "dtype": "bfloat16"}))
    out = tmp_path / "out"
    code, text, _ = run(capsys, "merge", recipe, out, "--json", "--max-shard-size", "40KB")
    assert code == 0
    report = json.loads(text)
    assert report["tensors"] == len(tensors(tmp_path / "model0"))
    assert report["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert report["peak_host_bytes"] > 20e6
    assert (out / "model.safetensors.index.json").is_file()
    assert load_hf(out)[0].dtype == "bfloat16"
    code, _, error = run(capsys, "merge", recipe, out)
    assert code == 2 and "not empty" in error
    code, _, error = run(capsys, "merge", recipe, three[1], "--overwrite")
    assert code == 2 and "or lies in it" in error
    recipe.write_text("method: ties\nbase: nowhere\nmodels: [x]\ndensity: 0.5\n")
    code, _, error = run(capsys, "merge", recipe, tmp_path / "never")
    assert code == 2 and "nowhere" in error and not (tmp_path / "never").exists()
    code, _, error = run(capsys, "merge", tmp_path / "none.yaml", out)
    assert code == 2 and "none.yaml" in error


def test_the_peak_is_that_of_the_process(tmp_path, three):
    """A process that holds 300 MB more reports 300 MB more."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": "linear", "models": three}))
    program = (
        "import sys, numpy as np; from llama_jax import cli; "
        "held = np.ones(int(sys.argv[1]), np.uint8); "
        "sys.exit(cli.main(['merge', sys.argv[2], sys.argv[3], '--json']))"
    )
    peaks = []
    for size in (1, 300_000_000):
        command = [sys.executable, "-c", program, str(size), str(recipe), str(tmp_path / str(size))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout)["peak_host_bytes"])
    assert 250e6 < peaks[1] - peaks[0] < 350e6
