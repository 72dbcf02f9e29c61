"""What a server takes of a slice, what its cache can hold there, and what would make it fit."""

from dataclasses import dataclass
from typing import Any

from infer.engine.options import EngineOptions, parse_mesh
from infer.fit.step import Step
from infer.server.settings import Settings
from llama_jax.config import Compute
from llama_jax.mesh.slices import Slice


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
            "advice": _advice(self),
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


def _advice(result: ServeFit) -> list[str]:
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
