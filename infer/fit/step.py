"""One compiled shape of an engine's steps, and what it takes."""

from dataclasses import dataclass
from typing import Any

from infer.engine.lowering import StepShape
from llama_jax.mesh.compile import Compiled
from llama_jax.mesh.slices import Slice


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
