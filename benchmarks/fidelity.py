"""SmolLM2-135M in float32 beside transformers: logits over 512 tokens, greedy texts of 20 prompts.

Where two texts part, transformers in float64 says how far apart their two tokens were.

usage: python benchmarks/fidelity.py FOLDER
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from workload import emit, prompts

import llama_jax as lj
from infer.generate import Generator
from infer.params import SamplingParams

NEW = 64


def main() -> None:
    folder = Path(sys.argv[1]) / "hf"
    model = lj.load(folder, dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 2
    ids = prompts(folder, 1, 512)
    with torch.inference_mode():
        expected = reference(torch.tensor(ids)).logits.numpy()
    got = np.asarray(lj.forward(model.config, model.params, jnp.asarray(ids)))
    texts = prompts(folder, 20, 24)
    config = model.config.replace(eos_token_id=())
    outputs = Generator(config, model.params).generate(
        texts, SamplingParams(temperature=0, max_tokens=NEW)
    )
    same, gaps = 0, []
    for output, prompt in zip(outputs, texts, strict=True):
        with torch.inference_mode():
            whole = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)
        wanted, found = whole[0, len(prompt) :].tolist(), list(output.token_ids)
        if wanted == found:
            same += 1
        else:
            gaps.append(_gap(folder, prompt, wanted, found))
    emit(
        largest_logit_difference=float(np.abs(got - expected).max()),
        tokens=512,
        identical_greedy_texts=f"{same}/20 of {NEW} tokens",
        gaps_where_texts_part=gaps,
    )


@functools.cache
def _exact(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def _gap(folder: Path, prompt: list[int], wanted: list[int], found: list[int]) -> float:
    """How much more likely (in logits, in float64) the first token that differs should have been
    than the one in its place."""
    place = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
    with torch.inference_mode():
        logits = _exact(folder)(torch.tensor([[*prompt, *wanted[:place]]])).logits[0, -1]
    return float(logits[wanted[place]] - logits[found[place]])


if __name__ == "__main__":
    main()
