"""`quantization_config` of compressed-tensors: what it says of each matrix of a model.

A group says how the linear layers that its targets name are written; `ignore` names those that are
not. Reading is strict: what would change the mathematics and is not done here is refused by name.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.formats.compressed_arguments import (
    SUPPORTED,
    Arguments,
    check_known,
    read_arguments,
)
from llama_jax.formats.compressed_kind import FORMATS, METHOD, PACKED_FORMAT, Kind
from llama_jax.formats.json_fields import is_equal, shorten
from llama_jax.weights.table import Weight, weight_table

_LINEAR = "Linear"  # the class of all matrices but the embedding
# Of one weight; a corrupt config can ask for a billion, whose names would be listed.
_MOST_MATRICES = 1 << 16

_READ = {"quant_method", "config_groups", "format", "ignore"}
# Of other values the weights are not what config_groups says, or more than they is rounded.
_FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_status": ("compressed", "frozen"),  # the first versions wrote the second
    "kv_cache_scheme": (),
    "transform_config": ({},),
    "moe_sparsity_config": ({},),
}
# Notes of what made the file, and options of its reader in transformers.
_INERT = {"global_compression_ratio", "version", "run_compressed", "dequantize"}
_GROUP_FIELDS = {"targets", "weights", "input_activations", "output_activations", "format"}


@dataclass(frozen=True)
class Stored:
    """How the files hold a matrix. is_packed: as `weight_packed`; per_tensor: it has one scale."""

    kind: Kind
    is_packed: bool
    per_tensor: bool


@dataclass(frozen=True)
class _Group:
    name: str
    targets: tuple[str, ...]
    stored: Stored


@dataclass(frozen=True)
class CompressedConfig:
    """Which linear layers are quantized, and how."""

    groups: tuple[_Group, ...]
    ignore: tuple[str, ...]

    def stored(self, module: str) -> Stored | None:
        """How a linear layer is held, by its name in Hugging Face's model; None: as it is."""
        if any(_precision(module, target) for target in self.ignore):
            return None
        found = [
            (_precision(module, target), group)
            for group in self.groups
            for target in group.targets
            if _precision(module, target)
        ]
        if not found:
            return None
        highest = max(precision for precision, _ in found)
        best = {group.stored: group.name for precision, group in found if precision == highest}
        if len(best) > 1:
            raise ValueError(
                f"config_groups {' and '.join(best.values())} say different things of {module}; "
                f"leave it to one of them"
            )
        return next(iter(best))


def read_compressed(settings: dict[str, Any]) -> CompressedConfig:
    """What a `quantization_config` says. Raises ValueError naming what is not understood or not
    supported."""
    known = _READ | set(_FIXED) | _INERT | {"sparsity_config"}
    check_known("", settings, known)
    for name, allowed in _FIXED.items():
        value = settings.get(name)
        if value is not None and not any(is_equal(value, each) for each in allowed):
            stated = " or ".join(["null", *(shorten(each) for each in allowed)])
            raise ValueError(f"{name} = {shorten(value)} is not supported, only {stated}")
    _check_sparsity(settings.get("sparsity_config"))
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"config_groups is {shorten(groups)}; it must map names to groups")
    return CompressedConfig(
        groups=tuple(_group(name, group, settings.get("format")) for name, group in groups.items()),
        ignore=_patterns("ignore", settings.get("ignore") or []),
    )


def stored_weights(settings: Any, config: ModelConfig) -> dict[str, Stored]:
    """Path -> how it is held, of the quantized matrices of a model; without settings, none.

    Raises ValueError as `read_compressed`, for layers of one weight that are held in different
    ways, for rows that groups do not divide, and for targets that name no matrix.
    """
    if settings is None:
        return {}
    described = read_compressed(settings)
    rows = {path: row for path, row in weight_table(config).items() if _is_linear(row)}
    for path, row in rows.items():
        if (count := math.prod(row.shape[:-2])) > _MOST_MATRICES:
            raise ValueError(
                f"{path} would be {count} matrices (num_hidden_layers is "
                f"{config.num_hidden_layers}), of which at most {_MOST_MATRICES} are read"
            )
    _check_targets(described, rows.values())
    found = {path: _stored(described, row) for path, row in rows.items()}
    return {path: stored for path, stored in found.items() if stored is not None}


def modules(row: Weight) -> list[str]:
    """The linear layers whose matrices a weight stacks."""
    return [name.removesuffix(".weight") for name, _ in row.hf_names()]


def _is_linear(row: Weight) -> bool:
    return row.role in ("matrix", "router", "head")


def _stored(described: CompressedConfig, row: Weight) -> Stored | None:
    each = {described.stored(module): module for module in modules(row)}
    if len(each) > 1:
        first, second = list(each.values())[:2]
        raise ValueError(
            f"{first} and {second} are held in different ways, but all layers of a weight must be "
            f"quantized alike, or none; name them in targets and ignore together"
        )
    (stored,) = each
    if stored is None:
        return None
    tile = stored.kind.tile
    if tile is not None and row.shape[-1] % tile:
        raise ValueError(
            f"group_size {tile} does not divide the {row.shape[-1]} inputs of {row.path}"
        )
    if stored.kind.activations is not None and ".experts." in row.path:
        raise ValueError(
            f"input_activations of {row.path} are rounded, but experts are multiplied in groups of "
            f"tokens, which takes full numbers; quantize their weights alone"
        )
    return stored


def _check_targets(described: CompressedConfig, rows: Iterable[Weight]) -> None:
    names = [module for row in rows for module in modules(row)]
    for group in described.groups:
        for target in group.targets:
            if not any(_precision(name, target) for name in names):
                raise ValueError(
                    f"config_groups.{group.name}.targets has {target!r}, which names no matrix of "
                    f"the layers or head; allowed are {_LINEAR}, names as {names[0]} and re: with "
                    f"a pattern of them"
                )


def _precision(module: str, target: str) -> int:
    """How closely a target names a linear layer; 0: not at all."""
    if target == module:
        return 3
    if target.startswith("re:"):
        return 2 if re.match(target[3:], module) else 0
    return 1 if target == _LINEAR else 0


def _group(name: str, group: Any, default_format: Any) -> _Group:
    where = f"config_groups.{name}"
    if not isinstance(group, dict):
        raise ValueError(f"{where} is {shorten(group)}; it must be a group with targets, weights")
    check_known(f"{where}.", group, _GROUP_FIELDS)
    if group.get("output_activations") is not None:
        raise ValueError(f"{where}.output_activations is not supported, only null; {SUPPORTED}")
    given = group.get("format") or default_format
    if given not in FORMATS:
        raise ValueError(
            f"{where} is in format {shorten(given)}, supported are {', '.join(FORMATS)}"
        )
    return _Group(
        name, _patterns(f"{where}.targets", group.get("targets")), _how(where, group, given)
    )


def _how(where: str, group: dict[str, Any], given: str) -> Stored:
    weights = read_arguments(f"{where}.weights", group.get("weights"))
    if weights is None:
        raise ValueError(f"{where}.weights is missing; {SUPPORTED}")
    inputs = read_arguments(f"{where}.input_activations", group.get("input_activations"))
    is_packed = given == PACKED_FORMAT
    bits = (8, 4) if is_packed else (8,)
    if (weights.is_float and is_packed) or weights.num_bits not in bits:
        raise ValueError(f"{weights} is not supported in format {given}; {SUPPORTED}")
    if weights.dynamic or weights.strategy not in ("tensor", "channel", "group"):
        raise ValueError(f"{weights} is not supported; {SUPPORTED}")
    tile = weights.group_size if weights.strategy == "group" else None
    activations = None if inputs is None else _activations(inputs, weights)
    if activations is not None and tile is not None and not weights.is_float:
        raise ValueError(
            f"{inputs} is not supported beside {weights}, whose sums are made group by group; "
            f"{SUPPORTED}"
        )
    return Stored(
        Kind(weights.num_bits, weights.is_float, tile, activations),
        is_packed=is_packed,
        per_tensor=weights.strategy == "tensor",
    )


def _activations(inputs: Arguments, weights: Arguments) -> str:
    how = {(True, "token"): "dynamic", (False, "tensor"): "static"}
    found = how.get((inputs.dynamic, inputs.strategy))
    if found is None or inputs.num_bits != 8 or inputs.is_float != weights.is_float:
        raise ValueError(f"{inputs} is not supported beside {weights}; {SUPPORTED}")
    return found


def _check_sparsity(sparsity: Any) -> None:
    """Of a dense format, how many zeros there are is a note."""
    if sparsity is None or sparsity == {}:
        return
    if not isinstance(sparsity, dict) or sparsity.get("format") != "dense":
        raise ValueError(
            f"sparsity_config = {shorten(sparsity)} is not supported, only null or format dense"
        )


def _patterns(where: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise ValueError(
            f"{where} is {shorten(given)}; it must be a list of names and re: patterns"
        )
    for each in given:
        if each.startswith("re:"):
            try:
                re.compile(each[3:])
            except re.error as error:
                raise ValueError(f"{where} has {each!r}, which is no pattern: {error}") from error
    return tuple(given)


def is_compressed(settings: Any) -> bool:
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD
