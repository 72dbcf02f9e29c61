"""What a compiled program does, read off its text: collectives and memory traffic, loops counted.

XLA's own cost analysis counts the body of a loop once, and a scanned model is one loop. Here every
computation is weighed by how often it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2,
    "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
_SLICES = ("dynamic-slice", "slice", "gather")
# What overwrites a part of its first operand in place, and which operand holds that part.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# What makes of a collective in a fusion one that goes on beside other fusions, and ends it.
_STARTS, _ENDS = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'
# What moves nothing by itself, or whose traffic is counted inside.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "optimization-barrier",
}  # fmt: skip


@dataclass(frozen=True)
class Collectives:
    """Of one kind, for one device and one run of the program. `count`: how many; `bytes`: what a
    device sends if they run round a ring, the least that any algorithm sends; `dcn_bytes`: the part
    in groups that span slices."""

    count: int
    bytes: float
    dcn_bytes: float


@dataclass
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


@dataclass
class Program:
    """Computations by name, each a list of instructions, and how often each runs."""

    computations: dict[str, list[_Instruction]]
    entry: str
    uncounted_loops: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads what `compiled.as_text()` gives. Raises ValueError when it has no entry."""
        computations: dict[str, list[_Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                root, name, shape, op, rest = match.groups()
                current.append(_Instruction(name, shape, op, rest, bool(root)))
        if not entry:
            raise ValueError("the text holds no ENTRY computation; give compiled.as_text()")
        return cls(computations, entry)

    def runs(self) -> Iterator[tuple[str, int, bool]]:
        """(computation, times it runs, whether it lies inside a fusion), each call apart."""
        yield from self._runs(self.entry, 1, False)

    def _runs(self, name: str, times: int, fused: bool) -> Iterator[tuple[str, int, bool]]:
        yield name, times, fused
        for instruction in self.computations.get(name, ()):
            trips = self._trips(instruction) if instruction.op == "while" else 1
            inside = fused or instruction.op not in ("while", "conditional", "call")
            for called in _CALLED.findall(instruction.rest):
                yield from self._runs(called, times * trips, inside)

    def _trips(self, loop: _Instruction) -> int:
        """Iterations of a loop that counts from zero to a constant, as `lax.scan` makes it."""
        known = re.search(r'known_trip_count\D+?"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        body = self.computations.get(condition[1], []) if condition else []
        constants = {
            each.name: int(each.rest.split(")")[0])
            for each in body
            if each.op == "constant" and each.rest.split(")")[0].isdigit()
        }
        for each in body:
            bounds = [constants[name] for name in each.operands if name in constants]
            if each.op in ("compare", "fusion") and each.is_root and len(bounds) == 1:
                return bounds[0]
        if loop.name not in self.uncounted_loops:
            self.uncounted_loops.append(loop.name)
        return 1

    def collectives(self, *, devices_per_slice: int | None = None) -> dict[str, Collectives]:
        """What is sent, by kind. A collective that the compiler spread over several fusions
        carries one channel in all of them and counts once."""
        found: dict[str, Collectives] = {}
        seen: set[tuple[Any, ...]] = set()
        for name, times, _ in self.runs():
            for instruction in self.computations.get(name, ()):
                kind = instruction.op.removesuffix("-start")
                if kind not in _KINDS:
                    continue
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                groups = tuple(_first_group(instruction.rest))
                size = _num_bytes(instruction.shape)
                key = (kind, channel[1], groups, size) if channel else (name, instruction.name)
                if key in seen:
                    continue
                seen.add(key)
                sent, spans = _sent(kind, instruction, devices_per_slice)
                before = found.get(kind, Collectives(0, 0.0, 0.0))
                found[kind] = Collectives(
                    before.count + times,
                    before.bytes + sent * times,
                    before.dcn_bytes + (sent * times if spans else 0.0),
                )
        return found

    def bytes_accessed(self, *, of_kernels: Mapping[str, float] | None = None) -> float:
        """Bytes that one device reads from and writes to its main memory: operands and results of
        every instruction that runs, slices at the size of the slice. Values that the compiler
        keeps on the chip, marked S(n) in the layout, are left out.

        of_kernels: of a call of a kernel that reads parts of its operands, by the beginning of its
        name."""
        counted: Counter[str] = Counter()
        for name, times, fused in self.runs():
            if not fused:
                counted[name] += times
        kernels = of_kernels or {}
        return sum(times * self._traffic(name, kernels) for name, times in counted.items())

    def _traffic(self, name: str, of_kernels: Mapping[str, float]) -> float:
        instructions = self.computations.get(name, [])
        shapes = {each.name: each.shape for each in instructions}
        total = 0.0
        for each in instructions:
            if each.op in _FREE or each.op.endswith("-done"):
                continue
            known = [size for start, size in of_kernels.items() if each.name.startswith(start)]
            if each.op == "custom-call" and known:
                total += known[0]
            elif inner := self._fused(each):
                reads = self._fusion_reads(inner)
                total += sum(
                    _num_bytes(shapes.get(operand, ""), memory=True) if size is None else size
                    for operand, size in zip(each.operands, reads, strict=False)
                )
                total += self._fusion_writes(inner, each.shape)
            elif each.op in _SLICES:
                total += 2 * _num_bytes(each.shape, memory=True)
            elif each.op in _UPDATES:
                update = each.operands[_UPDATES[each.op]]
                total += 2 * _num_bytes(shapes.get(update, ""), memory=True)
            else:
                total += _num_bytes(each.shape, memory=True)
                total += sum(_num_bytes(shapes.get(o, ""), memory=True) for o in each.operands)
        return total

    def _fused(self, instruction: _Instruction) -> str | None:
        """The computation of a fusion."""
        if instruction.op != "fusion":
            return None
        inner = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
        return inner[1] if inner and inner[1] in self.computations else None

    def _fusion_reads(self, name: str) -> list[float | None]:
        """Bytes read of each parameter; None: all there is."""
        body = self.computations[name]
        parameters = sorted(
            (each for each in body if each.op == "parameter"),
            key=lambda each: int(each.rest.split(")")[0]),
        )
        return [self._read_of(parameter.name, body) for parameter in parameters]

    def _fusion_writes(self, name: str, shape: str) -> float:
        """Bytes that a fusion with results of `shape` writes."""
        body = self.computations[name]
        by_name = {each.name: each for each in body}
        handed_on = _handed_on(body)
        results = [match[0] for match in _ARRAY.finditer(shape)]
        root = next(each for each in body if each.is_root)
        if _ENDS in root.rest:
            return 0.0
        if _STARTS in root.rest:
            # The first result is the operand, under another name.
            return sum(_num_bytes(result, memory=True) for result in results[1:])
        if root.op == "tuple" and len(results) == len(root.operands):
            made = zip((by_name[each] for each in root.operands), results, strict=True)
            return sum(_written(each, by_name, handed_on, result) for each, result in made)
        return _written(root, by_name, handed_on, shape)

    def _read_of(self, name: str, body: list[_Instruction]) -> float | None:
        """Bytes of a value that the instructions of a fusion read; None: all there is."""
        sizes = [self._read_by(each, name, body) for each in body if name in each.operands]
        known = [size for size in sizes if size is not None]
        return sum(known) if sizes and len(known) == len(sizes) else None

    def _read_by(self, user: _Instruction, name: str, body: list[_Instruction]) -> float | None:
        if "output_to_operand_aliasing" in user.rest:
            return self._read_of(user.name, body)  # the same value in another order
        if inner := self._fused(user):
            sizes = self._fusion_reads(inner)
            known = [size for each, size in zip(user.operands, sizes, strict=False) if each == name]
            return None if None in known else sum(size or 0.0 for size in known)
        if name in _handed_on(body) and (user.is_root or user.op in _KINDS):
            return 0.0
        if user.operands[0] != name or name in user.operands[1:]:
            return None
        if user.op in _SLICES:
            return _num_bytes(user.shape)
        return 0.0 if user.op in _UPDATES else None


def _handed_on(body: list[_Instruction]) -> set[str]:
    """The parameters that a fusion returns as they are. With some operations of the layer goes a
    part of a collective: its arrays come in and go out again, up to the fusion that ends it, where
    no byte of them is read or written but by the network. The one that starts it counts."""
    root = next(each for each in body if each.is_root)
    if root.op != "tuple" and _ENDS not in root.rest:
        return set()
    return {each.name for each in body if each.op == "parameter"} & set(root.operands)


def _written(
    made: _Instruction, by_name: Mapping[str, _Instruction], handed_on: set[str], result: str
) -> float:
    """Bytes that one result of a fusion, of this shape, costs."""
    while made.op == "bitcast" and made.operands[0] in by_name:
        made = by_name[made.operands[0]]
    if made.name in handed_on or (made.op in _KINDS and handed_on.intersection(made.operands)):
        return 0.0
    if made.op in _UPDATES and (update := by_name.get(made.operands[_UPDATES[made.op]])):
        return _num_bytes(update.shape)
    return _num_bytes(result, memory=True)


def _num_bytes(shape: str, *, memory: bool = False) -> float:
    """Of all arrays in a shape; with `memory` only of those in main memory."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype in _BYTES and not (memory and re.search(r"S\([1-9]", layout)):
            total += _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _sent(
    kind: str, instruction: _Instruction, devices_per_slice: int | None
) -> tuple[float, bool]:
    """(bytes a device sends round a ring, whether the group spans slices). What goes between slices
    the TPU compiler writes as a send through the host."""
    if kind == "send":
        first = _ARRAY.search(instruction.shape)
        return _num_bytes(first[0]) if first else 0.0, "is_host_transfer=true" in instruction.rest
    groups = _first_group(instruction.rest)
    size = len(groups)
    result = _num_bytes(instruction.shape)
    if instruction.op.endswith("-start"):
        # The shape of a start holds operands and results.
        arrays = [_num_bytes(m[0]) for m in re.finditer(_ARRAY, instruction.shape)]
        result = max(arrays, default=0.0) if kind == "all-gather" else sum(arrays) / 2
    spans = devices_per_slice is not None and (
        len({device // devices_per_slice for device in groups}) > 1
    )
    share = (size - 1) / size if size else 0.0
    if kind == "all-reduce":
        return 2 * result * share, spans
    if kind == "reduce-scatter":
        return result * (size - 1), spans
    return (result if kind == "collective-permute" else result * share), spans


def _first_group(rest: str) -> list[int]:
    """The devices, by place in the mesh, of the first group of a collective."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return [int(pairs[1]), int(pairs[2])]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(device) for device in listed[1].split(",")]
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\))\))? \{([^}]*)\}", rest
    ):
        sizes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])]
        places = _places(sizes, set(re.findall(r"'(\w+)'", named[3])))
        ids = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2] or "")
        return [int(_iota(ids[1], ids[2])[place]) for place in places] if ids else places
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota_group(iota)
    return []


def _places(sizes: list[tuple[str, int]], wanted: set[str]) -> list[int]:
    places, stride = [0], 1
    for name, size in reversed(sizes):
        if name in wanted:
            places = [place + step * stride for step in range(size) for place in places]
        stride *= size
    return sorted(places)


def _iota_group(match: "re.Match[str]") -> list[int]:
    devices = _iota(match[3], match[4])
    return [int(device) for device in devices.reshape(int(match[1]), int(match[2]))[0]]


def _iota(dims: str, order: str | None) -> Any:
    """0, 1, 2, … laid out in `dims`, transposed to `order` if there is one, in a row."""
    import numpy as np

    sizes = [int(n) for n in dims.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        devices = devices.transpose([int(n) for n in order.split(",")])
    return devices.reshape(-1)
