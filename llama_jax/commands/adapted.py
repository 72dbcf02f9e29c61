"""A MODEL with, if one is named, a PEFT adapter on it: what --adapter means everywhere."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.load import Model


def load_adapted(model: str, adapter: str | None) -> "Model":
    """Loads `model`; raises ValueError for an adapter that does not fit, and for an empty name."""
    from llama_jax.load import load

    if adapter is not None and not adapter.strip():
        # An empty path would be the current folder.
        raise ValueError("the adapter's name is empty; give a PEFT adapter folder")
    return load(model, adapter=adapter)
