"""What every engine is given: the model in each engine's format, the prompts, the result line."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

# Processes that a benchmark starts find their bytecode, as they do where Python may keep it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

TEXT = (
    "The harbour master wrote down every ship that came in that year, what it carried, where it "
    "had been, and how long it stayed. Two hundred years later the ledgers tell us which towns "
    "grew rich and which were passed over, when the winters were hard, and how news travelled "
    "along the coast. Some pages are missing, some were used to light a stove, and one was folded "
    "into a paper boat. In what follows I read three of these ledgers side by side and ask what "
    "each of them leaves out. The first was kept by a man who had been a fisherman and trusted "
    "nobody from inland; he gives the weather before anything else. The second belonged to the "
    "customs house, where salt, iron and cloth had columns of their own and people had none. The "
    "third is the diary of a girl of eleven, who counted sails from her window every evening until "
    "the lamps were lit, and who was, as far as anyone can check today, seldom wrong. "
)


def prompts(model: Path, batch: int, length: int) -> list[list[int]]:
    """`batch` lists of exactly `length` token ids, each another stretch of the same text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = TEXT * (2 + (length + 7 * batch) // 80)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[7 * row : 7 * row + length] for row in range(batch)]


def emit(**values: Any) -> None:
    values["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print("RESULT " + json.dumps(values), flush=True)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def prepare(folder: Path, gguf: str = "f32") -> None:
    """SmolLM2-135M as a Hugging Face folder in float32, and as a GGUF file of type `gguf`."""
    import llama_jax as lj
    from llama_jax.formats.gguf import save_gguf

    file = folder / f"model-{gguf}.gguf"
    if (folder / "hf").is_dir() and file.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = lj.load("smollm2-135m", dtype="float32")
    if not (folder / "hf").is_dir():
        lj.save_hf(model, folder / "hf")
    save_gguf(file, model.config, model.params, model.tokenizer, dtype=gguf, overwrite=True)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
