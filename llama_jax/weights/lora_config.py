"""PEFT's configuration of LoRA, checked; what it means for a model is in `lora_plan.py`."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_jax.config import is_finite_number

ALL_LINEAR = "all-linear"
_MOST_RANK = 1_000_000


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's fields, with PEFT's meaning.

    r: the rank.
    lora_alpha: numerator of the scale, lora_alpha / r.
    use_rslora: the scale is lora_alpha / sqrt(r) instead.
    rank_pattern and alpha_pattern: another r or lora_alpha for modules whose name ends with, or
      matches as a regular expression at its end, a key; the first such key counts.
    target_modules: names, each the whole name of a module or its last parts (`q_proj`); or one
      string, a regular expression for the whole name; or "all-linear": every matrix but the head.
    exclude_modules: those of them to leave out, named in the same ways.
    layers_to_transform: only these layers, counted from 0; not together with a regular expression.
    modules_to_save: modules trained whole beside their originals; a name means every module whose
      name ends with it, so `norm` means all norms.
    lora_dropout: in training, the probability with which a number that goes into an adapter is
      dropped. Any mesh drops the same, but for one that divides sequences, which drops others.
    ensure_weight_tying: with tied embeddings, one adapter serves both embedding and head. Tied
      weights cannot be adapted without it.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    ensure_weight_tying: bool = False
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "modules_to_save":
                if name != "target_modules" or not self.is_all_linear:
                    _check_regex(name, value)
            else:
                object.__setattr__(self, name, _names(name, value))
        if not self.target_modules:
            raise ValueError(
                "lora.target_modules is empty; name the modules to adapt, or train chosen weights "
                "without adapters (method full with patterns)"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(
                    f"lora.{name} is {getattr(self, name)!r}; give a mapping from ends of module "
                    f"names to numbers"
                )
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        for key, rank in self.rank_pattern.items():
            _check_regex("rank_pattern", key)
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            _check_regex("alpha_pattern", key)
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)
        for name in ("use_rslora", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"lora.{name} is {getattr(self, name)!r}; it must be a boolean")
        rate = self.lora_dropout
        if not is_finite_number(rate) or not 0 <= rate < 1:
            raise ValueError(
                f"lora.lora_dropout is {rate!r}; it is a probability: at least 0 and below 1"
            )
        self._check_layers()

    def _check_layers(self) -> None:
        layers: Any = self.layers_to_transform
        if layers is None:
            return
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = (layers,)
        if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
            raise ValueError(
                f"lora.layers_to_transform is {layers!r}; give a list of layer numbers, or leave "
                f"it out for all layers"
            )
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(
                    f"lora.layers_to_transform holds {layer!r}; layers are counted from 0"
                )
        if isinstance(self.target_modules, str) and not self.is_all_linear:
            raise ValueError(
                "lora.layers_to_transform cannot be combined with a regular expression in "
                "target_modules; put the layers into the expression, or list module names"
            )
        object.__setattr__(self, "layers_to_transform", tuple(layers))

    @property
    def is_all_linear(self) -> bool:
        target = self.target_modules
        return isinstance(target, str) and target.lower() == ALL_LINEAR

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scale_of(self, module: str) -> float:
        return lora_scale(self.rank_of(module), self.alpha_of(module), self.use_rslora)


def lora_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / r (Hu et al. 2021), or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    key = _deciding_key(patterns, module)
    return default if key is None else patterns[key]


def _deciding_key(patterns: Mapping[str, Any], module: str) -> str | None:
    return next((key for key in patterns if pattern_names(key, module)), None)


def used_keys(patterns: Mapping[str, Any], modules: Iterable[str]) -> set[str | None]:
    """The keys that decide about one of these modules, and None where none does."""
    return {_deciding_key(patterns, module) for module in modules}


def pattern_names(key: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern is about a module, as PEFT decides it."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _names(field_name: str, value: Any) -> tuple[str, ...]:
    names = sorted(value) if isinstance(value, set | frozenset) else value
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"lora.{field_name} is {value!r}; give a list of module names")
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"lora.{field_name} holds {name!r}; module names are strings")
    return tuple(names)


def _check_regex(field_name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"lora.{field_name}: {pattern!r} is not a regular expression: {error}"
        ) from error


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"lora.{name} is {value!r}; a rank is a positive integer")
    if value > _MOST_RANK:
        raise ValueError(f"lora.{name} is {value}; a rank is at most {_MOST_RANK}")


def _check_alpha(name: str, value: Any) -> None:
    # Scales are float32.
    if not is_finite_number(value) or not 0 < value <= 1e30:
        raise ValueError(f"lora.{name} is {value!r}; it must be above 0, at most 1e30")
