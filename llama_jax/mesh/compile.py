"""Compiling a lowered step for a slice that is not here, and what the compiler then knows of it."""

import math
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from llama_jax.mesh.hlo import Collectives, Program
from llama_jax.mesh.slices import Slice

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_AMOUNT = r"([\d.]+)([KMGB]?)"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: arguments (weights, optimizer state, batch), results that do not take
    the place of arguments, temporaries, and the program itself."""

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclass(frozen=True)
class Compiled:
    """memory: of one device, estimated from the compiler's refusal when `fits` is false;
    collectives and bytes_accessed (of one device) are None then. uncounted_loops: loops whose
    iterations could not be read; their bodies are counted once."""

    fits: bool
    memory: Memory
    seconds: float
    collectives: dict[str, Collectives] | None
    bytes_accessed: float | None
    uncounted_loops: tuple[str, ...]
    refusal: str | None

    def sent_per_chip(self, devices: int) -> dict[str, dict[str, float]] | None:
        """The collectives of the `devices` devices of a chip, by kind, for reports."""
        if self.collectives is None:
            return None
        return {
            kind: {
                "count": each.count,
                "bytes_per_chip": each.bytes * devices,
                "dcn_bytes_per_chip": each.dcn_bytes * devices,
            }
            for kind, each in self.collectives.items()
        }

    def bounds(self, wanted: Slice, flops: float) -> dict[str, float]:
        """Seconds that each of a chip's peak rates allows at best; flops: on all chips."""
        chip = wanted.generation
        bounds = {"compute": flops / wanted.total_chips / chip.peak_flops}
        if self.collectives is not None and self.bytes_accessed is not None:
            sent = self.collectives.values()
            dcn = sum(each.dcn_bytes for each in sent)
            devices = chip.devices_per_chip
            bounds["memory"] = self.bytes_accessed * devices / chip.hbm_bandwidth
            ici = sum(each.bytes for each in sent) - dcn
            bounds["ici"] = ici * devices / chip.ici_bandwidth
            if wanted.count > 1:
                bounds["dcn"] = dcn * devices / chip.dcn_bandwidth
        return bounds


def compile_for(
    lowered: Any,
    wanted: Slice,
    *,
    argument_bytes: int,
    of_kernels: Mapping[str, float] | None = None,
) -> Compiled:
    """Runs the TPU compiler. A program that does not fit is an answer, not an error; everything
    else that the compiler refuses is raised.

    argument_bytes: of one device, for when the compiler does not come so far as to count them.
    of_kernels: see `Program.bytes_accessed`.
    """
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # A compiler without a device can write entries of a compilation cache, not read them.
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - begin
        needed = _needed(str(error), argument_bytes)
        temporaries = max(needed - argument_bytes, 0)
        memory = Memory(argument_bytes, 0, temporaries, 0)
        return Compiled(False, memory, seconds, None, None, (), str(error).splitlines()[0])
    seconds = time.perf_counter() - begin
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    program = Program.parse(compiled.as_text())
    per_slice = wanted.num_devices // wanted.count if wanted.count > 1 else None
    return Compiled(
        fits=memory.total <= wanted.generation.hbm_bytes,
        memory=memory,
        seconds=seconds,
        collectives=program.collectives(devices_per_slice=per_slice),
        bytes_accessed=program.bytes_accessed(of_kernels=of_kernels),
        uncounted_loops=tuple(program.uncounted_loops),
        refusal=None,
    )


def device_bytes(structs: Any) -> int:
    """Bytes of one device, from shapes and shardings; what lies in the host's memory is not its."""
    total = 0
    for struct in jax.tree.leaves(structs):
        if struct.sharding.memory_kind == "pinned_host":
            continue
        shape = struct.sharding.shard_shape(struct.shape)
        itemsize = (
            8
            if jax.dtypes.issubdtype(struct.dtype, jax.dtypes.prng_key)
            else (struct.dtype.itemsize)
        )
        total += math.prod(shape) * itemsize
    return total


def _needed(message: str, argument_bytes: int) -> int:
    """Bytes of one device that the refused program wanted, to the three digits of the message."""
    if used := re.search(rf"Used {_AMOUNT} of {_AMOUNT} hbm", message):
        return _bytes(used[1], used[2])
    if temporaries := re.search(rf"HLO temporaries \({_AMOUNT}\) exceeds", message):
        # It counts what the program needs, arguments that it overwrites included.
        return max(_bytes(temporaries[1], temporaries[2]), argument_bytes)
    raise RuntimeError(f"the compiler's refusal names no amount of memory: {message[:300]}")


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])
