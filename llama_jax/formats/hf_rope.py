"""Rotary fields of `config.json`, in the forms of transformers 4 and 5.

transformers 4 has `rope_theta` and `rope_scaling` (whose kind is called `rope_type` or `type`),
transformers 5 has `rope_parameters` with everything inside.
"""

from typing import Any

from llama_jax.config import ROPE_TYPES, ModelConfig, RopeScaling
from llama_jax.formats.json_fields import field_names, is_equal, shorten, to_number

# What transformers takes when no theta is given.
_ROPE_THETA = {"llama": 10_000.0, "mistral": 10_000.0, "mixtral": 1_000_000.0}


def read_rope(values: dict[str, Any], family: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_theta` + `rope_scaling` (transformers 4), `rope_parameters`
    (transformers 5), or both where they agree."""
    old = _rope_dict(values, "rope_scaling")
    new = _rope_dict(values, "rope_parameters")
    thetas = {
        "rope_theta": values.get("rope_theta"),
        "rope_scaling.rope_theta": old.pop("rope_theta", None),
        "rope_parameters.rope_theta": new.pop("rope_theta", None),
    }
    given = {name: value for name, value in thetas.items() if value is not None}
    first = next(iter(given.values()), _ROPE_THETA[family])
    # Not `!=` alone: NaN differs from itself, and the config says what is wrong with it.
    if any(value is not first and value != first for value in given.values()):
        stated = ", ".join(f"{name} = {value}" for name, value in given.items())
        raise ValueError(f"{stated} disagree; remove the wrong one")
    theta = to_number("rope_theta", first)
    scalings = [
        _scaling(name, entries, values["max_position_embeddings"])
        for name, entries in (("rope_scaling", old), ("rope_parameters", new))
        if entries
    ]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ValueError(
            f"rope_scaling {shorten(old)} and rope_parameters {shorten(new)} disagree; remove the "
            f"wrong one"
        )
    return theta, scalings[0] if scalings else None


def _rope_dict(values: dict[str, Any], name: str) -> dict[str, Any]:
    entries = values.get(name, {})
    if not isinstance(entries, dict):
        raise ValueError(f"{name} is {shorten(entries)}; it must be an object")
    if any(isinstance(value, dict) for value in entries.values()):
        raise ValueError(f"{name} differs by layer: {shorten(entries)}; one for all is supported")
    return {key: value for key, value in entries.items() if value is not None}


def _scaling(owner: str, entries: dict[str, Any], max_positions: Any) -> RopeScaling | None:
    entries = dict(entries)
    kinds = [entries.pop(key) for key in ("rope_type", "type") if key in entries]
    if not kinds:
        raise ValueError(f"{owner} {shorten(entries)} has no rope_type")
    kind = kinds[0]
    if kinds[-1] != kind:
        raise ValueError(f"{owner}.rope_type {kind!r} and {owner}.type {kinds[-1]!r} disagree")
    if kind not in ("default", *ROPE_TYPES):
        raise ValueError(
            f"{owner}.rope_type {shorten(kind)} is not supported; allowed are default, "
            f"{', '.join(ROPE_TYPES)}"
        )
    if is_equal(entries.get("partial_rotary_factor"), 1):
        del entries["partial_rotary_factor"]
    if kind == "default":
        if entries:
            raise ValueError(
                f"{owner} of type 'default' holds {shorten(entries)}, which it ignores"
            )
        return None
    if kind == "dynamic" and "original_max_position_embeddings" in entries:
        # transformers scales by max_position_embeddings and never reads this field.
        if entries["original_max_position_embeddings"] != max_positions:
            raise ValueError(
                f"{owner}.original_max_position_embeddings is "
                f"{entries['original_max_position_embeddings']}, but rope_type 'dynamic' scales by "
                f"max_position_embeddings = {max_positions}; make them equal or remove the former"
            )
        del entries["original_max_position_embeddings"]
    numbers: dict[str, Any] = {
        name: value
        if name == "original_max_position_embeddings"
        else to_number(f"{owner}.{name}", value)
        for name, value in entries.items()
    }
    unknown = sorted(set(numbers) - set(field_names(RopeScaling)))
    if unknown:
        raise ValueError(f"{owner}.{unknown[0]} = {shorten(numbers[unknown[0]])} is unknown")
    if "factor" not in numbers:
        raise ValueError(f"{owner}.factor is missing; rope_type {kind!r} needs it")
    return RopeScaling(rope_type=kind, **numbers)


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The rotary fields under the names of transformers 4 and of transformers 5."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {
            name: getattr(config.rope_scaling, name)
            for name in field_names(RopeScaling)
            if getattr(config.rope_scaling, name) is not None
        }
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": config.rope_theta,
        },
    }
