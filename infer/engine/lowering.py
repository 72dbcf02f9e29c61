"""Every step that an engine over pages compiles, traced on shapes alone: no weight and no TPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infer.batch import Runnable
from infer.engine import paged_steps, steps
from infer.engine.columns import most_demanding_columns
from infer.engine.draft_model import VARIANTS
from infer.engine.paged_runner import PagedRunner
from infer.engine.shapes import draft_slots, drafted_shapes
from llama_jax.kernels.paged import with_axes
from llama_jax.mesh.sharding import partition_spec, replicated
from llama_jax.model.paged_cache import PagedCache, PageRows


@dataclass(frozen=True)
class StepShape:
    """kind: `prefill` reads a piece of a prompt, `decode` runs `tokens` tokens of each of `rows`
    rows, `sample` chooses a token after each, in the variant that does most. A draft model reads
    its own piece in `draft prefill`, and guesses `tokens` tokens of each row in `draft`."""

    kind: Literal["prefill", "decode", "sample", "draft prefill", "draft"]
    rows: int
    tokens: int

    @property
    def is_drafting(self) -> bool:
        """Whether it is a step of the draft model."""
        return self.kind in ("draft prefill", "draft")


@dataclass(frozen=True)
class TracedStep:
    traced: Any
    arguments: Any


def everywhere(mesh: Mesh, tree: Any) -> Any:
    """Shape structs of arrays that are whole on every device."""
    place = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


class AbstractEngine:
    """Shapes of what a runner holds: weights with adapters, pages, and what rows remember of their
    tokens. draft: a model that guesses, of shape structs too."""

    def __init__(self, runner: PagedRunner, draft: "AbstractDraft | None" = None):
        self.runner, self.model, self.draft = runner, runner.model, draft
        mesh = self.model.mesh
        assert mesh is not None
        self.mesh = mesh
        with jax.set_mesh(mesh):
            cache = jax.eval_shape(
                lambda: paged_steps.new_pages(self.model.config, **runner.page_options())
            )
            memory = jax.eval_shape(
                lambda: steps.new_memory(
                    num_slots=runner.scratch_slot + 1, vocab_size=self.model.config.vocab_size
                )
            )
        self.memory = everywhere(mesh, memory)
        self.cache = PagedCache(
            pages=with_axes(self._divided, cache.pages),
            layer=self._whole((), jnp.int32),
            num_pages=cache.num_pages,
            kernel=cache.kernel,
        )

    def _whole(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        place = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def _divided(self, array: Any, axes: tuple[str | None, ...]) -> Any:
        place = NamedSharding(self.mesh, partition_spec(axes, self.model.compute.rules))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    def largest(self) -> list[StepShape]:
        """The steps that need most memory."""
        rows = self.runner.shapes.rows[-1]
        length = self.runner.shapes.lengths(rows)[-1]
        return [
            StepShape("prefill", 1, self.runner.shapes.pieces[-1]),
            StepShape("decode", rows, length),
            StepShape("sample", rows, length),
        ]

    def all(self) -> list[StepShape]:
        pieces = [StepShape("prefill", 1, shape) for shape in self.runner.shapes.pieces]
        decoding = [StepShape("decode", *shape) for shape in self.runner.shapes.steps()]
        drafting = [] if self.draft is None else self.draft.all()
        return [*pieces, *decoding, self.largest()[-1], *drafting]

    def trace(self, shape: StepShape) -> TracedStep:
        if shape.kind == "sample":
            return self._sample(shape.rows * shape.tokens)
        if shape.is_drafting:
            assert self.draft is not None
            return self.draft.trace(shape)
        whole, pages = self._whole, self.runner.pages_per_row
        if shape.kind == "prefill":
            step: Any = paged_steps.read_piece
            own: Any = (whole((shape.tokens,)), whole((pages,)), *[whole(()) for _ in range(3)])
        else:
            step, size = paged_steps.run_tokens, (shape.rows, shape.tokens)
            rows = PageRows(whole((shape.rows, pages)), whole(size), whole((shape.rows,)))
            own = (whole(size), rows, whole((shape.rows,)))
        arguments = (self.runner.params, self.cache, *own)
        with jax.set_mesh(self.mesh):
            traced = step.trace(self.model.config, *arguments, compute=self.model.compute)
        return TracedStep(traced, arguments)

    def _sample(self, count: int) -> TracedStep:
        vocab_size = self.model.config.vocab_size
        logits = jax.ShapeDtypeStruct((count, vocab_size), jnp.float32)
        columns, needs = most_demanding_columns(count, vocab_size)
        arguments = (
            self._divided(logits, (None, "vocab")),
            self.memory,
            self._whole((count,)),
            self._whole((count, -(-vocab_size // 32)), jnp.uint32),
            *everywhere(self.mesh, (columns, self.model.rules)),
            self._whole((count,)),
        )
        with jax.set_mesh(self.mesh):
            traced = steps.take.trace(*arguments, needs=needs)
        return TracedStep(traced, arguments)


class AbstractDraft:
    """Shapes of what a draft model holds, whole on every device: weights, and slots.

    model: it, as `guesses.small_model` gives it. runner: of the model that it guesses for.
    """

    def __init__(self, model: Runnable, runner: PagedRunner):
        self.model, self.runner = model, runner
        cache = jax.eval_shape(
            lambda: steps.new_cache(
                model.config,
                num_slots=draft_slots(runner.options),
                capacity=runner.capacity,
                dtype=model.compute.held_dtype,
            )
        )
        assert model.mesh is not None
        self.mesh = model.mesh
        self.cache = everywhere(self.mesh, cache)

    def all(self) -> Sequence[StepShape]:
        options = self.runner.options
        pieces = [StepShape("draft prefill", 1, shape) for shape in self.runner.shapes.pieces]
        guesses = [
            StepShape("draft", rows, options.draft_tokens) for rows in drafted_shapes(options)
        ]
        return [*pieces, *guesses]

    def trace(self, shape: StepShape) -> TracedStep:
        config, number = self.model.config, np.zeros((), np.int32)
        more: dict[str, Any] = {"compute": self.model.compute}
        if shape.kind == "draft prefill":
            step: Any = steps.read_piece
            own: Any = (np.zeros(shape.tokens, np.int32), *[number] * 4)
        else:
            step, vocab_size = steps.propose, self.runner.model.config.vocab_size
            each = np.zeros(shape.rows, np.int32)
            last = np.zeros((shape.rows, 2), np.int32)
            columns, _ = most_demanding_columns(shape.rows, vocab_size)
            own = (last, last, number, columns, self.runner.model.rules, each)
            more |= {"num": shape.tokens, "needs": VARIANTS[-1], "vocab_size": vocab_size}
        arguments = (self.model.params, self.cache, *everywhere(self.mesh, own))
        with self.model.context():
            traced = step.trace(config, *arguments, **more)
        return TracedStep(traced, arguments)
