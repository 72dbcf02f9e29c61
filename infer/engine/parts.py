"""What an engine is made of, and how large: chosen from a model, options and devices."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jax.sharding import Mesh

from infer.batch import Runnable
from infer.engine import placement
from infer.engine.agreement import Agreement
from infer.engine.draft_model import DraftModel
from infer.engine.guesses import Guesser, small_model
from infer.engine.hosts import EngineFollowers
from infer.engine.leading import LeadingRunner
from infer.engine.memory import (
    blocks_and_context,
    check_context,
    longest_context,
    pages_and_context,
)
from infer.engine.options import EngineOptions
from infer.engine.paged_runner import PagedRunner
from infer.engine.runner import Runner
from infer.engine.slot_runner import SlotRunner
from infer.engine.structure import Grammars
from infer.generate import Generator, parts_of
from infer.layers import Layers
from llama_jax.config import Compute, ModelConfig


@dataclass(frozen=True)
class Parts:
    """generator: the model made ready, and the checks of what is wished of it. grammars: None
    without a tokenizer."""

    generator: Generator
    runner: Runner
    num_blocks: int
    guesser: Guesser
    grammars: Grammars | None


def make_parts(
    model: Any,
    options: EngineOptions,
    *,
    compute: Compute,
    mesh: Mesh | None,
    draft: Any,
    followers: EngineFollowers | None,
    agreement: Agreement | None,
) -> Parts:
    """Arguments as of `BatchingEngine`. Raises ValueError for what does not go together."""
    config, params, tokenizer = parts_of(model)
    check_context(config, options.max_context)
    if mesh is not None:
        compute = replace(compute, rules=placement.RULES)
    uses_pages = placement.uses_pages(options, mesh)
    small = None
    if draft is not None:
        small = small_model(
            draft,
            options,
            config=config,
            tokenizer=tokenizer,
            compute=compute,
            mesh=placement.draft_mesh(mesh),
        )
    num_blocks, context = _sizes(
        config,
        options,
        dtype=compute.held_dtype,
        mesh=mesh,
        small=small,
        uses_pages=uses_pages,
        agreement=agreement,
    )
    layers: Layers = "auto"
    if isinstance(params["layers"], dict):
        # Pages are handed on through a scan as well, which needs no copy of the weights.
        layers = "scanned" if uses_pages else "unrolled"
    generator = Generator(
        config,
        params,
        tokenizer,
        compute=compute,
        mesh=mesh,
        layers=layers,
        max_context=context,
    )
    make_runner: Any = PagedRunner if uses_pages else SlotRunner
    if followers is not None:
        make_runner = partial(LeadingRunner, followers=followers)
    runner: Runner = make_runner(
        generator.model, options, capacity=generator.max_context, num_blocks=num_blocks
    )
    guesser = Guesser(options, runner, _draft_model(small, options, runner))
    return Parts(generator, runner, num_blocks, guesser, _grammars(generator))


def _sizes(
    config: ModelConfig,
    options: EngineOptions,
    *,
    dtype: str,
    mesh: Mesh | None,
    small: Runnable | None,
    uses_pages: bool,
    agreement: Agreement | None,
) -> tuple[int, int]:
    """The number of blocks, and the longest context."""
    longest = longest_context(config)
    draft = None if small is None else small.config
    if uses_pages:
        least = None if agreement is None else agreement.least
        return pages_and_context(
            config, options, longest, dtype=dtype, mesh=mesh, draft=draft, least=least
        )
    return blocks_and_context(config, options, longest, dtype=dtype, draft=draft)


def _draft_model(
    small: Runnable | None, options: EngineOptions, runner: Runner
) -> DraftModel | None:
    if small is None:
        return None
    return DraftModel(
        small,
        options,
        longest=longest_context(small.config),
        capacity=runner.capacity,
        shapes=runner.shapes.pieces,
        vocab_size=runner.model.config.vocab_size,
    )


def _grammars(generator: Generator) -> Grammars | None:
    if generator.tokenizer is None:
        return None
    return Grammars(
        generator.tokenizer,
        vocab_size=generator.model.config.vocab_size,
        end_tokens=generator.end_tokens,
    )
