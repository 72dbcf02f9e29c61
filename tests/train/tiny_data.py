"""The shipped byte tokenizer, rows written to files, and a batch of random tokens."""

import json
from pathlib import Path

import numpy as np

from llama_jax.formats.tokenizer import Tokenizer, load_tokenizer
from llama_jax.model.losses import Batch
from tests.tiny import tiny_tokens
from train.data.files import package_path

TOKENIZER = "package:demo/tokenizer"


def byte_tokenizer() -> Tokenizer:
    return load_tokenizer(package_path(TOKENIZER))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_row(question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def random_batch(rows: int = 8, length: int = 12, seed: int = 0, counted: float = 0.5) -> Batch:
    """Shifted targets of random tokens; about `counted` of them count."""
    tokens = tiny_tokens(rows, length, seed)
    rng = np.random.default_rng(seed)
    targets = np.roll(tokens, -1, axis=1)
    mask = (rng.random((rows, length)) < counted).astype(np.float32)
    mask[:, -1] = 0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
    return Batch(tokens, targets, mask, np.ones((rows, length), np.int32), positions)
