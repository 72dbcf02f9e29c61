"""What a model in training says to the prompts of its run: training asks, inference answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from train.config import RunConfig


def sample(run: "RunConfig", model: tuple[Any, Any, Any], mesh: "Mesh") -> Sequence[str]:
    """The continuation of each of `train.sample_prompts`, the likeliest token at each place.

    model: (config, params, tokenizer), where the parameters lie on the mesh.
    """
    from infer.generate import generate

    outputs = generate(
        model,
        list(run.train.sample_prompts),
        temperature=0.0,
        max_tokens=run.train.sample_max_tokens,
        compute=run.compute,
        mesh=mesh,
        # One compiled layer, and no second copy of the parameters beside those in training.
        layers="scanned",
    )
    # A text is missing only where there is no tokenizer, without which nothing is trained.
    return [output.text for output in outputs if output.text is not None]
