"""An engine's steps compiled for a slice, with as many blocks as fit."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from infer import steps as offline
from infer.batch import Runnable
from infer.engine import placement
from infer.engine.lowering import AbstractDraft, AbstractEngine, StepShape
from infer.engine.memory import check_context, longest_context, page_bytes
from infer.engine.options import EngineOptions, parse_mesh
from infer.engine.paged_runner import PagedRunner
from infer.fit.serve_fit import ServeFit
from infer.fit.shape import draft_of, read_shape
from infer.fit.step import Step
from infer.server.build import engine_options
from infer.server.settings import Settings
from llama_jax.config import Compute
from llama_jax.kernels.paged_int8 import BLOCK_QUERIES
from llama_jax.mesh.compile import compile_for, device_bytes
from llama_jax.mesh.flops import count_flops
from llama_jax.mesh.sharding import shardings
from llama_jax.mesh.slices import Slice, slice_devices

Say = Callable[[str], None]

# Those that read pages.
_KERNELS = "ragged_paged_attention", "int8_paged_attention"
# How much attention computes follows from how long rows are, which is added.
_SHARES = dict.fromkeys((*_KERNELS, "while"), 0.0)


def fit(settings: Settings, wanted: Slice, say: Say) -> ServeFit:
    """Compiles what an engine with these settings compiles, for a slice.

    Raises ValueError when model, mesh and slice do not suit each other, RuntimeError where libtpu
    is missing.
    """
    config, params, tokenizer = read_shape(settings)
    sizes = {"tensor": 1} if settings.mesh is None else parse_mesh(settings.mesh)
    if math.prod(sizes.values()) != wanted.num_devices:
        raise ValueError(
            f"mesh is {settings.mesh or 'not given'}, and {wanted.name} has {wanted.num_devices} "
            f"devices; their number must be the product of the mesh's axes, such as "
            f"mesh=tensor={wanted.num_devices}"
        )
    mesh, *_ = placement.serving_meshes(sizes, slice_devices(wanted))
    parts = placement.check(config, mesh)
    places = shardings(config, params, mesh, placement.RULES)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
    )
    options = dataclasses.replace(engine_options(settings), cache="pages")
    check_context(config, settings.max_context)
    context = settings.max_context or longest_context(config)
    end_tokens: Any = np.zeros(max(1, len(config.eos_token_id)), np.int32)
    model = Runnable(
        config=config,
        params=params,
        compute=Compute(
            dtype=settings.dtype or Compute().dtype,
            cache_dtype=settings.cache_dtype,
            rules=placement.RULES,
        ),
        mesh=mesh,
        rules=offline.Rules(None, end_tokens),
        tokenizer=tokenizer,
    )
    size = page_bytes(config, options, model.compute.held_dtype, parts=parts, kernel=True)
    draft = draft_of(settings, model)
    trial = _Trial(settings, wanted, model, draft, options, context, page_bytes=size, say=say)
    return trial.result()


@dataclass(frozen=True)
class _Trial:
    settings: Settings
    slice: Slice
    model: Runnable
    draft: Runnable | None
    options: EngineOptions
    context: int
    page_bytes: int
    say: Say
    known: dict[Any, Step] = field(default_factory=dict)  # by shape and number of blocks

    def result(self) -> ServeFit:
        row = -(-self.context // self.options.block_size)
        given = self.options.num_blocks
        first = self._compiled(given or row, AbstractEngine.all)
        if not first.is_compiled:
            first = self._compiled(row, AbstractEngine.all)
        largest = self._largest(first, row)
        full = self.options.max_slots * row
        num_blocks = given or max(row, min(full, largest))
        result = self._compiled(num_blocks, AbstractEngine.all)
        return dataclasses.replace(result, largest_blocks=largest)

    def _largest(self, first: ServeFit, row: int) -> int:
        """The most blocks that fit, proven by compiling the largest steps with them; 0 when one
        row does not fit. first: all steps, compiled with any number of blocks."""
        few = self._compiled(first.num_blocks, AbstractEngine.largest)
        # The programs of the other steps lie beside them.
        limit = self.slice.generation.hbm_bytes - (first.device_bytes - few.device_bytes)
        blocks = first.num_blocks + (limit - few.device_bytes) // self.page_bytes
        while blocks >= row:
            found = self._compiled(blocks, AbstractEngine.largest)
            if found.is_compiled and found.device_bytes <= limit:
                return blocks
            missing = max(found.device_bytes - limit, 1)
            blocks -= -(-missing // self.page_bytes)
        return 0

    def _compiled(
        self, num_blocks: int, chosen: Callable[[AbstractEngine], Iterable[StepShape]]
    ) -> ServeFit:
        runner = PagedRunner(self.model, self.options, capacity=self.context, num_blocks=num_blocks)
        draft = None if self.draft is None else AbstractDraft(self.draft, runner)
        engine = AbstractEngine(runner, draft)
        weights = device_bytes(self.model.params)
        steps = [self._step(shape, engine, num_blocks) for shape in chosen(engine)]
        return ServeFit(
            settings=self.settings,
            slice=self.slice,
            options=self.options,
            cache_dtype=self.model.compute.held_dtype,
            context=self.context,
            num_blocks=num_blocks,
            largest_blocks=0,
            weights=weights,
            adapters=device_bytes(runner.params) - weights,
            draft=0 if draft is None else device_bytes((draft.model.params, draft.cache)),
            pages=device_bytes(engine.cache),
            memory=device_bytes(engine.memory),
            steps=tuple(steps),
        )

    def _step(self, shape: StepShape, engine: AbstractEngine, num_blocks: int) -> Step:
        key = shape, num_blocks if shape.kind in ("prefill", "decode") else None
        if key not in self.known:
            self.say(f"{shape.kind} of {shape.rows} x {shape.tokens}, {num_blocks} blocks")
            self.known[key] = self._compile(shape, engine, num_blocks)
        return self.known[key]

    def _compile(self, shape: StepShape, engine: AbstractEngine, num_blocks: int) -> Step:
        config, size = self.model.config, self.options.block_size
        # A single row can be as long as the context, all of them only as long as pages last; a
        # draft model has slots.
        length = self.context
        if shape.rows > 1 and not shape.is_drafting:
            length = min(length, num_blocks * size // self.options.max_slots)
        # A kernel reads a row's pages once for each block of its queries.
        passes = shape.rows * -(-shape.tokens // BLOCK_QUERIES)
        layer_bytes = self.page_bytes / config.num_hidden_layers / size
        step = engine.trace(shape)
        compiled = compile_for(
            step.traced.lower(),
            self.slice,
            argument_bytes=device_bytes(step.arguments),
            of_kernels=dict.fromkeys(_KERNELS, passes * length * layer_bytes),
        )
        flops = count_flops(step.traced.jaxpr, kernel_shares=_SHARES)
        if shape.kind != "sample":
            if shape.is_drafting:
                assert self.draft is not None
                config = self.draft.config
            heads = config.num_attention_heads * config.head_dim
            # Before it guesses, a draft model reads a row's last two tokens.
            queries = shape.rows * (shape.tokens + (shape.kind == "draft"))
            flops += 4.0 * config.num_hidden_layers * heads * queries * length
        return Step(shape, compiled, flops)
