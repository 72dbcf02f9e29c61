"""What may stand for a MODEL, known without JAX and without asking the Hub."""

import re

from llama_jax.paths import to_path

SMOLLM2 = "smollm2-135m"
ALLOWED = (
    "a Hugging Face folder (with config.json), a .gguf file, a llama-jax checkpoint or run folder, "
    f"{SMOLLM2!r}, or a Hugging Face Hub id such as 'org/name'"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")


def check_model_name(name: str) -> None:
    """Raises ValueError for what is neither on the disk nor a name."""
    is_there = bool(name) and to_path(name).exists()
    if not (is_there or name == SMOLLM2 or is_hub_id(name)):
        raise ValueError(f"{name!r} is neither there nor a name that is known; give {ALLOWED}")
