"""Whether a run fits a TPU slice: its real step, compiled by the real TPU compiler, without a TPU.

Bytes are the compiler's own. Times are bounds: what the published peak rates of a chip allow for
the counted work, not what a chip will do.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax import tree
from llama_jax.config import REMAT_POLICIES, Compute, ModelConfig
from llama_jax.kernels.platforms import check_kernels
from llama_jax.kernels.splash import visited_share
from llama_jax.mesh.compile import Compiled, compile_for, device_bytes
from llama_jax.mesh.flops import count_flops
from llama_jax.mesh.sequence import length_parts
from llama_jax.mesh.sharding import make_mesh, mesh_axes
from llama_jax.mesh.slices import Slice, slice_devices
from llama_jax.model import moe
from llama_jax.model.flops import Trained, executed_flops, model_flops
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.table import weight_table
from llama_jax.weights.tensors import QatTensor
from train.config import RunConfig
from train.distill_teacher import read_teacher_shape
from train.setup import Setup, make_setup, rows_per_item
from train.start import read_shape

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """flops and model_flops: of one step on all chips, as executed and without anything done
    twice; closed_form_flops: the former by formula, None for methods that have none."""

    run: RunConfig
    slice: Slice
    compiled: Compiled
    flops: float
    closed_form_flops: float | None
    model_flops: float
    trained_parameters: int
    parameters: int

    @property
    def chip_bytes(self) -> int:
        return self.compiled.memory.total * self.slice.generation.devices_per_chip

    def bounds(self) -> dict[str, float]:
        """Seconds of a step that each of a chip's peak rates allows at best."""
        return self.compiled.bounds(self.slice, self.flops)

    def to_dict(self) -> dict[str, Any]:
        chip = self.slice.generation
        per_chip = chip.devices_per_chip
        memory = dataclasses.asdict(self.compiled.memory)
        bounds = self.bounds()
        longest = max(bounds, key=lambda name: bounds[name])
        train = self.run.train
        tokens = train.batch_size * train.sequence_length
        peak = self.model_flops / self.slice.total_chips / chip.peak_flops
        return {
            "slice": self.slice.name,
            "chips": self.slice.total_chips,
            "topology": "x".join(map(str, self.slice.topology)),
            "cloud_accelerator_type": self.slice.cloud_accelerator_type,
            "fits": self.compiled.fits,
            "hbm_bytes_per_chip": self.chip_bytes,
            "hbm_limit": self.slice.hbm_bytes_per_chip,
            "missing_bytes_per_chip": max(self.chip_bytes - self.slice.hbm_bytes_per_chip, 0),
            "refusal": self.compiled.refusal,
            "advice": advice(self),
            **{f"{name}_bytes_per_chip": size * per_chip for name, size in memory.items()},
            "flops_per_step": self.flops,
            "closed_form_flops": self.closed_form_flops,
            "model_flops_per_step": self.model_flops,
            "bytes_accessed_per_chip": _times(self.compiled.bytes_accessed, per_chip),
            "collectives": self.compiled.sent_per_chip(per_chip),
            "uncounted_loops": list(self.compiled.uncounted_loops),
            "bound_seconds": bounds,
            "bound_by": longest,
            "bound_tokens_per_second": tokens / bounds[longest],
            "bound_mfu": peak / bounds[longest],
            "batch_size": train.batch_size,
            "sequence_length": train.sequence_length,
            "remat": self.run.compute.remat,
            "method": self.run.method,
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "compile_seconds": self.compiled.seconds,
        }


def _times(value: float | None, factor: int) -> float | None:
    return None if value is None else value * factor


def fit(run: RunConfig, wanted: Slice) -> Fit:
    """Compiles the step of `run` for a slice.

    Raises ValueError when the mesh, the batch or the model do not suit the slice, RuntimeError
    where libtpu is missing.
    """
    config, params = read_shape(run)
    mesh = make_mesh(run.mesh.sizes(), devices=slice_devices(wanted))
    check_kernels(run.compute, config, mesh.devices.flat[0].platform)
    if run.distill is not None and run.distill.step == "pmap":
        raise ValueError(
            "distill.step is pmap, which runs on the devices that are there and is not compiled "
            "for others; prove distill.step=jit, which needs as much on a mesh of the data axis"
        )
    setup = make_setup(run, config, params, mesh, teacher=read_teacher_shape(run, config))
    batch = setup.batch_struct(run.train.batch_size)
    with jax.set_mesh(mesh):
        traced = setup.step.trace(setup.abstract, batch, *setup.beside)
        parts = length_parts(run.compute.rules)
        shares = _computed_shares(run, config, parts, mesh)
        flops = count_flops(traced.jaxpr, kernel_shares=shares)
        compiled = compile_for(
            traced.lower(),
            wanted,
            argument_bytes=device_bytes((setup.abstract, batch, setup.beside)),
        )
    trained = trained_weights(setup, config)
    rows = run.train.batch_size * setup.rows_per_item
    length = run.train.sequence_length
    sizes: dict[str, Any] = {"tokens": rows * length, "length": length, "trained": trained}
    has_form = run.dpo is None and run.distill is None and _is_uniform(setup, config)
    num_trained, num_parameters = setup.num_parameters()
    return Fit(
        run=run,
        slice=wanted,
        compiled=compiled,
        flops=flops,
        closed_form_flops=(
            executed_flops(config, run.compute, parts=parts, **sizes) if has_form else None
        ),
        model_flops=model_flops(config, **sizes),
        trained_parameters=num_trained,
        parameters=num_parameters,
    )


def _computed_shares(
    run: RunConfig, config: ModelConfig, parts: int, mesh: Mesh
) -> dict[str, float]:
    """Of the operations that the shapes of kernels and ragged products make room for."""
    shares = {}
    if run.compute.attention == "splash":
        length = run.train.sequence_length
        shares["splash"] = visited_share(length, config.sliding_window, parts)
    if config.moe is not None:
        holders = math.prod(mesh.shape[axis] for axis in mesh_axes(run.compute.rules, "experts"))
        share = moe.computed_share(
            config.moe.num_experts_per_tok, config.moe.num_local_experts, holders
        )
        # Megablox leaves its kernels the name of the function.
        shares |= dict.fromkeys(("ragged_dot", "kernel"), share)
    return shares


def trained_weights(setup: Setup, config: ModelConfig) -> Trained:
    """Which products of a step have gradients of their weights."""
    mask = _trained_arrays(setup)
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    adapters = 0
    for path, leaf in tree.flatten(setup.abstract.params).items():
        if isinstance(leaf, LoraTensor):
            size = leaf.lora_a.size + leaf.lora_b.size
            if config.moe is not None and ".experts." in path:
                size = size * config.moe.num_experts_per_tok // config.moe.num_local_experts
            adapters += size
    return Trained(
        # Only a weight trained itself, with no adapter around it, is found under its own path.
        layers=any(mask.get(path, False) for path in _layer_matrices(config)),
        head=mask.get(head, False) or mask.get(f"{head}.saved", False),
        adapters=adapters,
    )


def _layer_matrices(config: ModelConfig) -> list[str]:
    table = weight_table(config)
    return [path for path in table if path.startswith("layers.") and table[path].role == "matrix"]


def _is_uniform(setup: Setup, config: ModelConfig) -> bool:
    """Whether all matrices of the layers are trained alike, which the closed form supposes."""
    mask = _trained_arrays(setup)
    flags = {mask.get(path, False) for path in _layer_matrices(config)}
    return len(flags) == 1 and setup.run.quantization is None and setup.run.qat is None


def _trained_arrays(setup: Setup) -> dict[str, bool]:
    """Which arrays are trained, by path; a weight in quantization-aware training by its own."""
    mask = tree.flatten_arrays(setup.mask)
    for path, leaf in tree.flatten(setup.abstract.params).items():
        if isinstance(leaf, QatTensor):
            mask[path] = mask[f"{path}.weight"]
    return mask


def advice(result: Fit) -> list[str]:
    """What would make a run fit that does not; nothing for one that does."""
    if result.compiled.fits:
        return []
    run, wanted = result.run, result.slice
    limit, memory = wanted.generation.hbm_bytes, result.compiled.memory
    found = []
    if memory.arguments > limit:
        chips = math.ceil(wanted.chips * memory.arguments / limit)
        larger = [size for size in wanted.generation.grids if size >= chips]
        found.append(
            f"weights, gradients' moments and batch alone take more than a chip has: at least "
            f"{wanted.generation.name}-{larger[0]} is needed"
            if larger
            else f"no {wanted.generation.name} slice holds weights and moments; use more slices, "
            f"another generation, or method lora"
        )
    if run.compute.remat in ("none", "dots"):
        found.append("compute.remat=full keeps only the input of each layer")
    if run.compute.remat != "offload":
        found.append("compute.remat=offload keeps that in the host's memory")
    if run.compute.attention == "reference":
        found.append("compute.attention=splash never holds the scores")
    if _may_narrow_gradients(run):
        found.append("compute.gradient_dtype=bfloat16 halves the gradients, and rounds them")
    rows = run.train.batch_size // run.train.gradient_accumulation_steps
    if rows >= 2 * wanted.num_devices:
        steps = run.train.gradient_accumulation_steps
        found.append(
            f"train.gradient_accumulation_steps={2 * steps} halves what is kept of the batch"
        )
    larger = [size for size in wanted.generation.grids if size > wanted.chips]
    if larger:
        found.append(f"the next slice is {wanted.generation.name}-{larger[0]}")
    found.append("`llama-jax fit --search` finds what fits")
    return found


def _may_narrow_gradients(run: RunConfig) -> bool:
    """Sums over micro-batches are float32 in any case."""
    compute = dataclasses.replace(run.compute, gradient_dtype="bfloat16")
    if run.train.gradient_accumulation_steps > 1 or compute == run.compute:
        return False
    try:
        dataclasses.replace(run, compute=compute)
    except ValueError:
        return False
    return True


# Search


def smallest_slices(run: RunConfig, generation: Any, say: Say) -> Iterator[Fit]:
    """Compiles for slices of a generation by bisection; the last of them that fits is the
    smallest. Slices that the mesh or the batch do not suit are left out; when that is all of them,
    raises the ValueError of one."""
    sizes, unsuited = list(generation.grids), None
    low, high = 0, len(sizes) - 1
    while low <= high:
        middle = (low + high) // 2
        wanted = Slice(generation, sizes[middle])
        try:
            result = fit(run, wanted)
        except ValueError as error:
            unsuited = error
            say(f"{wanted.name}: {error}")
            sizes.pop(middle)
            high -= 1
            continue
        yield result
        say(f"{wanted.name}: {'fits' if result.compiled.fits else 'does not fit'}")
        low, high = (low, middle - 1) if result.compiled.fits else (middle + 1, high)
    if not sizes and unsuited is not None:
        raise unsuited


def largest_batches(run: RunConfig, wanted: Slice, say: Say) -> Iterator[Fit]:
    """For each recomputation policy, the cheapest first, compiles for batch sizes by doubling and
    bisection; the largest that fits of each is the answer."""
    unit = _batch_unit(run, wanted)
    for remat in REMAT_POLICIES:
        good, bad, size = 0, None, 1
        while bad is None or bad - good > 1:
            trial = _with(run, remat=remat, batch_size=size * unit)
            result = fit(trial, wanted)
            yield result
            word = "fits" if result.compiled.fits else "does not fit"
            say(f"remat {remat}, batch {size * unit}: {word}")
            good, bad = (size, bad) if result.compiled.fits else (good, size)
            size = 2 * good if bad is None else (good + bad) // 2
            if bad is not None and good == 0:
                break


def _batch_unit(run: RunConfig, wanted: Slice) -> int:
    """The smallest batch that can be dealt out."""
    mesh = make_mesh(run.mesh.sizes(), devices=slice_devices(wanted))
    axes = dict(run.compute.rules)["batch"]
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[name] for name in names)
    steps = run.train.gradient_accumulation_steps
    return steps * parts // math.gcd(parts, rows_per_item(run))


def _with(run: RunConfig, *, remat: Any, batch_size: int) -> RunConfig:
    compute = dataclasses.replace(run.compute, remat=remat)
    if not compute.cuts_experts:
        compute = dataclasses.replace(compute, moe_chunk_tokens=Compute.moe_chunk_tokens)
    return dataclasses.replace(
        run,
        compute=compute,
        train=dataclasses.replace(run.train, batch_size=batch_size),
    )


def best(results: list[Fit]) -> Fit | None:
    """Of those that fit: the fewest chips, then the largest batch, then the least recomputation,
    which is the order in which they were tried."""
    fitting = [result for result in results if result.compiled.fits]
    return min(fitting, key=lambda r: (r.slice.total_chips, -r.run.train.batch_size), default=None)
