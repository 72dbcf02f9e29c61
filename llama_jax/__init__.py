"""Training and inference for the Llama family in JAX and Flax.

>>> import llama_jax as lj
>>> model = lj.load("smollm2-135m")

Names are looked up on first use, so importing this package imports nothing else.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from infer.generate import generate
    from llama_jax.config import Compute, ModelConfig, MoeConfig, RopeScaling
    from llama_jax.load import Model, load, save_hf
    from llama_jax.model.transformer import forward
    from llama_jax.presets import presets

# Where each public name lives. `generate` is the one name from beyond this package:
# the library imports neither train nor infer, the notebook user should not have to care.
_HOMES = {
    "Compute": "llama_jax.config",
    "Model": "llama_jax.load",
    "ModelConfig": "llama_jax.config",
    "MoeConfig": "llama_jax.config",
    "RopeScaling": "llama_jax.config",
    "forward": "llama_jax.model.transformer",
    "generate": "infer.generate",
    "load": "llama_jax.load",
    "presets": "llama_jax.presets",
    "save_hf": "llama_jax.load",
}

__all__ = [
    "Compute",
    "Model",
    "ModelConfig",
    "MoeConfig",
    "RopeScaling",
    "forward",
    "generate",
    "load",
    "presets",
    "save_hf",
]


class _Package(ModuleType):
    """This package; each public name is looked up in its home on first use."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(
                f"module 'llama_jax' has no attribute {name!r}; it offers {', '.join(__all__)}"
            )
        value = getattr(import_module(_HOMES[name]), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds a submodule to its name here, and would so put the module
        # `load` where the function `load` belongs (`presets` likewise).
        if name in _HOMES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Package
