"""The same merges by mergekit and by `llama-jax merge`, on tiny random models.

    python benchmarks/against_mergekit.py --python VENV/bin/python --folder /tmp/mk

mergekit wants other versions of shared packages, so it runs with the Python of an environment of
its own. Prints the largest difference of each method. Result and settings: docs/merging.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import yaml

from llama_jax.formats.hf import load_hf, save_hf
from llama_jax.formats.safetensors import SafetensorsFile
from llama_jax.merge.model import merge_models
from llama_jax.presets import presets
from llama_jax.weights.merge_recipe import read_recipe
from llama_jax.weights.table import init_params

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
MERGEKIT = """
import sys, torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
import yaml
run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1]))), sys.argv[2],
          MergeOptions(copy_tokenizer=False, write_model_card=False))
"""
# (ours, mergekit's parameters of all, of each model)
CASES = {
    "linear": ({"normalize": True}, {"normalize": True}, ()),
    "task_arithmetic": ({"scale": 0.5}, {"lambda": 0.5}, ()),
    "ties": ({"density": 0.3, "scale": 1.5}, {"lambda": 1.5}, ("density",)),
    "slerp": ({"t": 0.3}, {"t": 0.3}, ()),
}
WEIGHTS = (0.7, 0.6)


def write_models(folder: Path) -> list[str]:
    config = presets["llama3.2-1b"].replace(**SHAPE)
    models = []
    for seed in range(3):
        save_hf(folder / f"m{seed}", config, init_params(config, jax.random.key(seed)))
        models.append(str(folder / f"m{seed}"))
    return models


def recipes(method: str, models: list[str]) -> tuple[dict, dict]:
    ours, shared, each = CASES[method]
    with_base = method in ("task_arithmetic", "ties")
    members = models[1:] if with_base or method == "slerp" else models[:2]
    entries = [{"model": m, "weight": w} for m, w in zip(members, WEIGHTS, strict=True)]
    own = {"method": method, **ours, "models": members if method == "slerp" else entries}
    theirs = {"merge_method": method, "dtype": "float32", "parameters": shared}
    extra = {name: ours[name] for name in each}
    theirs["models"] = [
        {"model": e["model"], "parameters": {"weight": e["weight"], **extra}} for e in entries
    ]
    if method == "slerp":
        theirs["models"] = [{"model": m} for m in members]
        theirs["base_model"] = members[0]
    if with_base:
        own["base"] = theirs["base_model"] = models[0]
    return own, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment with mergekit")
    parser.add_argument("--folder", type=Path, required=True, help="for scratch; must be new")
    args = parser.parse_args()
    args.folder.mkdir()
    models = write_models(args.folder)
    for method in CASES:
        own, theirs = recipes(method, models)
        merge_models(read_recipe(own, method), args.folder / method)
        config = args.folder / f"{method}.yaml"
        config.write_text(yaml.safe_dump(theirs))
        out = args.folder / f"{method}-mergekit"
        subprocess.run([args.python, "-c", MERGEKIT, str(config), str(out)], check=True)
        load_hf(out)  # complete and of our shape
        one, two = (SafetensorsFile(f / "model.safetensors") for f in (args.folder / method, out))
        names = one.header.tensors
        largest = max(float(np.abs(one.view(n) - two.view(n)).max()) for n in names)
        print(f"{method}: {len(names)} tensors, largest difference {largest:.2g}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
