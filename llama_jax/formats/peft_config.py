"""`adapter_config.json`: read into a `LoraConfig`, and written.

Every field is either read, known to change nothing, or refused by name when it asks for something
that is not plain LoRA: an adapter never loads as something else than what was trained.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.formats.json_fields import read_json
from llama_jax.weights.lora_config import LoraConfig, used_keys
from llama_jax.weights.lora_plan import (
    adapted_modules,
    idle_names,
    module_names,
    names_module,
)
from llama_jax.weights.table import weight_table

CONFIG_NAME = "adapter_config.json"

_READ = (
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "ensure_weight_tying",
)
# Where it was trained and how: no effect on what the adapter computes. Dropout acts in training
# only; the two megatron and qalora fields are read by PEFT only beside others that are refused.
_NEUTRAL = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
# Initialisations that leave the base weights as they are.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_REASONS = {
    "alora_invocation_tokens": "the adapter acts only after certain tokens (aLoRA)",
    "arrow_config": "adapters are routed (Arrow)",
    "bias": "biases were trained beside the adapter",
    "corda_config": "the base weights were changed (CorDA)",
    "fan_in_fan_out": "the base layers are stored transposed",
    "init_lora_weights": "the base weights were changed when the adapter was made",
    "kasa_config": "it is KaSA, not LoRA",
    "layer_replication": "layers of the base are repeated",
    "layers_pattern": "layers are counted in another list than model.layers",
    "loftq_config": "the base weights were changed (LoftQ)",
    "lora_bias": "the adapter has biases of its own",
    "lora_ga_config": "the base weights were changed (LoRA-GA)",
    "megatron_config": "it is for Megatron's layers",
    "monteclora_config": "it is MonteCLoRA, not LoRA",
    "target_parameters": "it adapts parameters that are not modules",
    "trainable_token_indices": "single embedding rows were trained",
    "use_bdlora": "it is block-diagonal LoRA",
    "use_dora": "it is DoRA, not LoRA",
    "use_qalora": "it is QA-LoRA, not LoRA",
    "velora_config": "it is VeLoRA, not LoRA",
}
# How PEFT says that something is not asked for; the others are null.
_NOTHING = {
    "bias": "'none'",
    "fan_in_fan_out": "false",
    "lora_bias": "false",
    "use_dora": "false",
    "use_qalora": "false",
}


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The JSON object of a folder, after refusing everything that is not plain LoRA."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}, so it is not a PEFT adapter")
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA adapters can be loaded"
        )
    for name in ("r", "lora_alpha", "target_modules"):
        if raw.get(name) is None and not (
            name == "target_modules" and raw.get("target_parameters")
        ):
            raise ValueError(f"{path}: {name} is missing")
    for name, value in raw.items():
        if name not in _READ and name not in _NEUTRAL and not _is_default(name, value):
            if name in _REASONS and not value:  # it asks for nothing, but not in PEFT's words
                raise ValueError(
                    f"{path}: {name} is {value!r}; it must be {_NOTHING.get(name, 'null')}"
                )
            reason = f": {_REASONS[name]}" if name in _REASONS else ", a field unknown here"
            raise ValueError(
                f"{path}: {name} is {value!r}{reason}. Such adapters cannot be loaded; merge it "
                f"with PEFT and load the merged model"
            )
    return raw


def _is_default(name: str, value: Any) -> bool:
    if name == "bias":
        return value in (None, "none")
    if name == "init_lora_weights":
        return value is None or value in _PLAIN_STARTS
    if name == "layers_pattern":
        return value in (None, "", [], "layers", ["layers"])
    if name == "target_parameters":
        return True  # judged with the tensors, in `peft_mixtral`
    return value is None or value is False or value in ({}, [], "")


def to_lora_config(config: ModelConfig, raw: dict[str, Any]) -> LoraConfig:
    """The `LoraConfig` of a checked JSON object.

    PEFT lets lists name modules that a model does not have (lists are shared between models);
    such names, and names and patterns that decide nothing, are dropped here, and the adapter's
    tensors decide whether anything is missing.
    """
    modules = [m for row in weight_table(config).values() for m, _ in module_names(row)]
    fields = {name: raw[name] for name in _READ if raw.get(name) is not None}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value = fields.get(name)
        if isinstance(value, list):
            fields[name] = tuple(
                n
                for n in value
                if not isinstance(n, str)  # which the config refuses
                or any(names_module(n, m, by_ending=name == "modules_to_save") for m in modules)
                or (name != "exclude_modules" and n == "lm_head")
            )
    if fields.get("target_modules") == ():
        raise ValueError(
            f"the adapter's target_modules {raw['target_modules']!r} name no module of this model"
        )
    if isinstance(fields.get("layers_to_transform"), list):
        fields["layers_to_transform"] = tuple(fields["layers_to_transform"]) or None
    lora = _without_idle(config, LoraConfig(**fields), modules)
    adapted = adapted_modules(config, lora)

    def known(patterns: Mapping[str, Any]) -> dict[str, Any]:
        used = used_keys(patterns, adapted)
        return {key: value for key, value in patterns.items() if key in used}

    return dataclasses.replace(
        lora, rank_pattern=known(lora.rank_pattern), alpha_pattern=known(lora.alpha_pattern)
    )


def _without_idle(config: ModelConfig, lora: LoraConfig, modules: list[str]) -> LoraConfig:
    targets, excluded = idle_names(config, lora)
    kept: dict[str, Any] = {}
    if not isinstance(lora.exclude_modules, str):
        kept["exclude_modules"] = tuple(n for n in lora.exclude_modules if n not in excluded)
    elif excluded:
        kept["exclude_modules"] = ()
    if not isinstance(lora.target_modules, str):
        # What names no module at all is left to be refused, as is a list that means nothing.
        idle = {n for n in targets if any(names_module(n, m) for m in modules)}
        left = tuple(n for n in lora.target_modules if n not in idle)
        kept["target_modules"] = left or lora.target_modules
    return dataclasses.replace(lora, **kept)


def to_json(lora: LoraConfig, base_model_name_or_path: str | None) -> dict[str, Any]:
    """What PEFT reads back as the same adapter."""
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "use_rslora": lora.use_rslora,
        "target_modules": _plain(lora.target_modules),
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "modules_to_save": list(lora.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": lora.lora_dropout,
        "use_dora": False,
    }
    if lora.ensure_weight_tying:  # PEFT before 0.19 does not know the field
        values["ensure_weight_tying"] = True
    return values


def _plain(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)
