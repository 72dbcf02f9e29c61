"""What a model in training says: continuations of the run's prompts at each evaluation."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llama_jax import tree
from llama_jax.config import ModelConfig
from train.config import RunConfig
from train.entries import read_entries

# sample(run, (model config, params, tokenizer), mesh) -> the continuation of each of the run's
# prompts. Brought by the command, because training knows nothing of inference.
Sampler = Callable[[RunConfig, tuple[ModelConfig, tree.Tree, Any], Mesh], Sequence[str]]


class GenerationsLog:
    """A line {"step": …, "prompt": …, "text": …} for each prompt and evaluation.

    Lines of steps behind `resume_step` are dropped: those steps are trained again.
    """

    def __init__(self, path: Path, *, resume_step: int):
        self._path = path
        kept = [entry for entry in read_generations(path) if entry["step"] <= resume_step]
        if kept or path.is_file():
            temporary = path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
            temporary.replace(path)

    def write(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            for prompt, text in zip(prompts, texts, strict=True):
                file.write(_line({"step": step, "prompt": prompt, "text": text}))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def read_generations(path: Path) -> list[dict[str, Any]]:
    """The entries of a generations.jsonl; see `read_entries`."""
    return read_entries(path)
