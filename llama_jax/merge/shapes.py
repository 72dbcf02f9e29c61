"""What must agree between the models of a merge."""

import logging
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.merge.sources import Source
from llama_jax.weights.merge_recipe import Recipe
from llama_jax.weights.table import weight_table

logger = logging.getLogger(__name__)

# Fields that say what is done with weights of the same shapes.
_MATHEMATICS = ("rope_theta", "rope_scaling", "rms_norm_eps", "sliding_window")


def check_shapes(recipe: Recipe, sources: list[Source]) -> None:
    """Everything but the number of vocabulary rows must agree; mathematics that differs is told."""
    first, host = recipe.inputs[0][0], sources[0].config
    wanted = _shapes(host)
    for (name, model), source in zip(recipe.inputs, sources, strict=True):
        found = _shapes(source.config)
        for path in (*wanted, *found):
            shapes = wanted.get(path), found.get(path)
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{name} ({model}) has {path} of shape {shapes[1]}, {first} "
                    f"({recipe.inputs[0][1]}) {shapes[0]}; only models of one architecture merge"
                )
        for field in _MATHEMATICS:
            values = getattr(host, field), getattr(source.config, field)
            if values[0] != values[1]:
                logger.warning(
                    "%s has %s %s, %s has %s; the result has %s's",
                    *(name, field, values[1], first, values[0], first),
                )


def _shapes(config: ModelConfig) -> dict[str, Any]:
    return {
        path: tuple(
            "vocabulary" if axis == "vocab" else size
            for axis, size in zip(row.axes, row.shape, strict=True)
        )
        for path, row in weight_table(config).items()
    }
