"""Whether a server fits a TPU slice: every step of its engine, compiled by the real TPU compiler,
without a TPU.

Bytes are the compiler's own. Times are bounds: what the published peak rates of a chip allow for
the counted work, not what a chip will do.
"""

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
from infer.engine.draft_model import check_draft
from infer.engine.guesses import undivided
from infer.engine.lowering import AbstractDraft, AbstractEngine, StepShape, everywhere
from infer.engine.memory import check_context, longest_context, page_bytes
from infer.engine.options import EngineOptions, parse_mesh
from infer.engine.paged_runner import PagedRunner
from infer.server.build import engine_options, quantization_of
from infer.server.settings import Settings
from llama_jax.config import Compute, ModelConfig
from llama_jax.kernels.paged_int8 import BLOCK_QUERIES
from llama_jax.mesh.compile import Compiled, compile_for, device_bytes
from llama_jax.mesh.flops import count_flops
from llama_jax.mesh.sharding import shardings
from llama_jax.mesh.slices import Slice, slice_devices
from llama_jax.model.layout import for_decoding
from llama_jax.presets import preset
from llama_jax.weights.table import abstract_params

Say = Callable[[str], None]
# Config, parameters as shape structs, and the tokenizer where the model itself was looked at.
Shape = tuple[ModelConfig, Any, Any]

# Those that read pages.
_KERNELS = "ragged_paged_attention", "int8_paged_attention"
# How much attention computes follows from how long rows are, which is added.
_SHARES = dict.fromkeys((*_KERNELS, "while"), 0.0)


@dataclass(frozen=True)
class Step:
    """One compiled shape. flops: on all chips, every row at its longest."""

    shape: StepShape
    compiled: Compiled
    flops: float

    @property
    def transient_bytes(self) -> int:
        """Of one device, while it runs, beside what stays."""
        memory = self.compiled.memory
        return memory.temporaries + memory.outputs

    def to_dict(self, wanted: Slice) -> dict[str, Any]:
        per_chip, memory = wanted.generation.devices_per_chip, self.compiled.memory
        bounds = self.compiled.bounds(wanted, self.flops)
        accessed = self.compiled.bytes_accessed
        return {
            "step": self.shape.kind,
            "rows": self.shape.rows,
            "tokens": self.shape.tokens,
            "fits": self.compiled.fits,
            "refusal": self.compiled.refusal,
            "arguments_bytes_per_chip": memory.arguments * per_chip,
            "temporaries_bytes_per_chip": memory.temporaries * per_chip,
            "outputs_bytes_per_chip": memory.outputs * per_chip,
            "code_bytes_per_chip": memory.code * per_chip,
            "flops": self.flops,
            "bytes_accessed_per_chip": None if accessed is None else accessed * per_chip,
            "collectives": self.compiled.sent_per_chip(per_chip),
            "uncounted_loops": list(self.compiled.uncounted_loops),
            "bound_seconds": bounds,
            "bound_by": max(bounds, key=lambda name: bounds[name]),
            "compile_seconds": self.compiled.seconds,
        }


@dataclass(frozen=True)
class ServeFit:
    """weights, adapters, draft, pages and memory: bytes of one device, of what stays on it; of the
    draft model weights, keys and values; the last is what rows remember of their tokens. context:
    the longest that is served. largest_blocks: how many fit, 0 when not even one row does.
    cache_dtype: of keys and values."""

    settings: Settings
    slice: Slice
    options: EngineOptions
    cache_dtype: str
    context: int
    num_blocks: int
    largest_blocks: int
    weights: int
    adapters: int
    draft: int
    pages: int
    memory: int
    steps: tuple[Step, ...]

    @property
    def copies(self) -> int:
        """Of the model, each with an engine and a cache of its own: counts are of one of them."""
        return parse_mesh(self.settings.mesh or "tensor=1").get("data", 1)

    @property
    def device_bytes(self) -> int:
        """What stays, all programs, and what the most demanding of them needs while it runs."""
        own = [step for step in self.steps if not step.shape.is_drafting]
        drafting = [step.compiled.memory.arguments for step in self.steps if step not in own]
        staying = max(step.compiled.memory.arguments for step in own) + self.memory
        staying += max([self.draft, *drafting])
        # While adapters are exchanged, the old and the new are there.
        staying += self.adapters
        code = sum(step.compiled.memory.code for step in self.steps)
        return staying + code + max(step.transient_bytes for step in self.steps)

    @property
    def is_compiled(self) -> bool:
        return all(step.compiled.fits for step in self.steps)

    @property
    def fits(self) -> bool:
        return self.is_compiled and self.device_bytes <= self.slice.generation.hbm_bytes

    @property
    def decode(self) -> Step:
        """The step of all rows."""
        return max(
            (step for step in self.steps if step.shape.kind == "decode"),
            key=lambda step: (step.shape.rows, -step.shape.tokens),
        )

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * self.options.block_size

    @property
    def row_tokens(self) -> int:
        """Of each row when all are as long as they can be together."""
        return min(self.context, self.cache_tokens // self.options.max_slots)

    def to_dict(self) -> dict[str, Any]:
        chip, wanted = self.slice.generation, self.slice
        per_chip, decode = chip.devices_per_chip, self.decode.to_dict(wanted)
        longest = max(decode["bound_seconds"].values())
        largest = self.largest_blocks * self.options.block_size
        return {
            "slice": wanted.name,
            "chips": wanted.total_chips,
            "hosts": wanted.hosts * wanted.count,
            "topology": "x".join(map(str, wanted.topology)),
            "cloud_accelerator_type": wanted.cloud_accelerator_type,
            "mesh": self.settings.mesh,
            "copies": self.copies,
            "model": self.settings.models[0],
            "dtype": self.settings.dtype or Compute().dtype,
            "cache_dtype": self.cache_dtype,
            "quantization": self.settings.quantization,
            "fits": self.fits,
            "hbm_bytes_per_chip": self.device_bytes * per_chip,
            "hbm_limit": wanted.hbm_bytes_per_chip,
            "missing_bytes_per_chip": max(self.device_bytes - chip.hbm_bytes, 0) * per_chip,
            "advice": advice(self),
            "weights_bytes_per_chip": self.weights * per_chip,
            "adapters_bytes_per_chip": self.adapters * per_chip,
            "draft_bytes_per_chip": self.draft * per_chip,
            "cache_bytes_per_chip": self.pages * per_chip,
            "sampling_bytes_per_chip": self.memory * per_chip,
            "transient_bytes_per_chip": per_chip * max(step.transient_bytes for step in self.steps),
            "code_bytes_per_chip": per_chip * sum(s.compiled.memory.code for s in self.steps),
            "max_slots": self.options.max_slots,
            "max_context": self.context,
            "cache_tokens": self.cache_tokens,
            "row_tokens": self.row_tokens,
            "largest_cache_tokens": largest,
            "largest_slots_of_max_context": largest // self.context,
            "largest_context_of_max_slots": min(largest // self.options.max_slots, self.context),
            "flops_per_step": decode["flops"],
            "bytes_accessed_per_chip": decode["bytes_accessed_per_chip"],
            "collectives": decode["collectives"],
            "bound_seconds": decode["bound_seconds"],
            "bound_by": decode["bound_by"],
            "bound_tokens_per_second": self.copies * self.decode.shape.rows / longest,
            "steps": [step.to_dict(wanted) for step in self.steps],
            "compile_seconds": sum(step.compiled.seconds for step in self.steps),
        }


def read_shape(settings: Settings) -> Shape:
    """The model that is served, as shape structs: of `architecture` if it is given, so that no
    weights need be there. Raises ValueError."""
    if len(settings.models) != 1:
        raise ValueError(
            f"{len(settings.models)} models are given; what fits is found for one model at a time"
        )
    model = settings.models[0].partition("=")[2] or settings.models[0]
    config, params, tokenizer = _shape_of(model, "architecture", settings.architecture)
    quantization = quantization_of(settings)
    if quantization is not None:
        from llama_jax.formats.streaming import abstract_quantized

        params = abstract_quantized(config, params, quantization)
    return config, params, tokenizer


def _shape_of(model: str, setting: str, architecture: str | None) -> Shape:
    if architecture is not None:
        config = preset(architecture, field=setting)
        return config, abstract_params(config), None
    from llama_jax.load import load_abstract

    loaded = load_abstract(model)
    return loaded.config, loaded.params, loaded.tokenizer


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
    draft = _draft_of(settings, model)
    trial = _Trial(settings, wanted, model, draft, options, context, page_bytes=size, say=say)
    return trial.result()


def _draft_of(settings: Settings, model: Runnable) -> Runnable | None:
    """The model that guesses for `model`, as shape structs in the form in which it runs. Raises
    ValueError for one that cannot, as far as tokenizers or vocabularies tell."""
    if settings.draft_model is None:
        return None
    config, params, tokenizer = _shape_of(
        settings.draft_model, "draft_architecture", settings.draft_architecture
    )
    known = model.tokenizer is not None and tokenizer is not None
    ours, theirs = (model.tokenizer, tokenizer) if known else (None, None)
    check_draft(model.config, ours, config, theirs)
    assert model.mesh is not None
    params = everywhere(model.mesh, jax.eval_shape(for_decoding, params))
    return dataclasses.replace(
        model, config=config, params=params, compute=undivided(model.compute), tokenizer=tokenizer
    )


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


def advice(result: ServeFit) -> list[str]:
    """What would make a server fit that does not; nothing for one that does."""
    if result.fits:
        return []
    wanted, found = result.slice, []
    if result.largest_blocks:
        tokens = result.largest_blocks * result.options.block_size
        found.append(
            f"cache_tokens={tokens} fits, which is max_slots={max(1, tokens // result.context)} of "
            f"{result.context} tokens each"
        )
    else:
        found.append("not even one row of max_context fits beside the weights; lower max_context")
    if result.settings.quantization is None:
        found.append("quantization=int8 halves the weights, int4 and nf4 quarter them")
    if result.cache_dtype != "int8":
        found.append("cache_dtype=int8 keeps more tokens in the same memory (block_size=128)")
    if result.adapters:
        found.append("fewer max_adapters, or a smaller max_lora_rank, leave more room")
    if result.draft:
        found.append("draft_model, its keys and its values lie whole on every device; leave it out")
    larger = [size for size in wanted.generation.grids if size > wanted.chips]
    if larger:
        found.append(f"the next slice is {wanted.generation.name}-{larger[0]}")
    return found
