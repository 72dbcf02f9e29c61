"""A MODEL with, if one is named, a PEFT adapter put on it."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.load import Model


def load_adapted(model: str, adapter: str | None) -> "Model":
    """Loads `model`; raises ValueError for an adapter that does not fit, and for an empty name."""
    from llama_jax.load import load

    if adapter is not None and not adapter.strip():
        raise ValueError("the adapter's name is empty; give a PEFT adapter folder")
    loaded = load(model)
    if adapter is None:
        return loaded
    from llama_jax.formats.peft import load_adapter

    return dataclasses.replace(loaded, params=load_adapter(adapter, loaded.config, loaded.params))
