"""Every step that an engine over pages compiles, traced on shapes alone: no weight and no TPU."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from infer.engine import paged_steps, steps
from infer.engine.paged_runner import PagedRunner
from infer.engine.runner import most_demanding_columns
from llama_jax.kernels.paged import with_axes
from llama_jax.mesh.sharding import partition_spec
from llama_jax.model.paged_cache import PagedCache, PageRows


@dataclass(frozen=True)
class StepShape:
    """kind: `prefill` reads a piece of a prompt, `decode` runs `tokens` tokens of each of `rows`
    rows, `sample` chooses a token after each, in the variant that does most."""

    kind: Literal["prefill", "decode", "sample"]
    rows: int
    tokens: int


@dataclass(frozen=True)
class TracedStep:
    traced: Any
    arguments: Any


class AbstractEngine:
    """Shapes of what a runner holds: weights, pages, and what rows remember of their tokens."""

    def __init__(self, runner: PagedRunner):
        self.runner, self.model = runner, runner.model
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
        self.memory = jax.tree.map(lambda x: self._whole(x.shape, x.dtype), memory)
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
        rows = self.runner.row_shapes[-1]
        length = self.runner.lengths(rows)[-1]
        return [
            StepShape("prefill", 1, self.runner.piece_shapes[-1]),
            StepShape("decode", rows, length),
            StepShape("sample", rows, length),
        ]

    def all(self) -> list[StepShape]:
        pieces = [StepShape("prefill", 1, shape) for shape in self.runner.piece_shapes]
        decoding = [StepShape("decode", *shape) for shape in self.runner.step_shapes()]
        return [*pieces, *decoding, self.largest()[-1]]

    def trace(self, shape: StepShape) -> TracedStep:
        if shape.kind == "sample":
            return self._sample(shape.rows * shape.tokens)
        whole, pages = self._whole, self.runner.pages_per_row
        if shape.kind == "prefill":
            step: Any = paged_steps.read_piece
            own: Any = (whole((shape.tokens,)), whole((pages,)), *[whole(()) for _ in range(3)])
        else:
            step, size = paged_steps.run_tokens, (shape.rows, shape.tokens)
            rows = PageRows(whole((shape.rows, pages)), whole(size), whole((shape.rows,)))
            own = (whole(size), rows, whole((shape.rows,)))
        arguments = (self.model.params, self.cache, *own)
        with jax.set_mesh(self.mesh):
            traced = step.trace(self.model.config, *arguments, compute=self.model.compute)
        return TracedStep(traced, arguments)

    def _sample(self, count: int) -> TracedStep:
        vocab_size = self.model.config.vocab_size
        logits = jax.ShapeDtypeStruct((count, vocab_size), jnp.float32)
        columns, needs = most_demanding_columns(count, vocab_size)

        def whole(tree: Any) -> Any:
            return jax.tree.map(lambda x: self._whole(np.shape(x), np.asarray(x).dtype), tree)

        arguments = (
            self._divided(logits, (None, "vocab")),
            self.memory,
            self._whole((count,)),
            self._whole((count, -(-vocab_size // 32)), jnp.uint32),
            whole(columns),
            whole(self.model.rules),
            self._whole((count,)),
        )
        with jax.set_mesh(self.mesh):
            traced = steps.take.trace(*arguments, needs=needs)
        return TracedStep(traced, arguments)
