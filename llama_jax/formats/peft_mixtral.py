"""Adapters on Mixtral's experts as PEFT stores them on transformers 5.

There the experts of a layer are two stacked parameters, `gate_up_proj` [E, 2F, D] and `down_proj`
[E, D, F], and PEFT keeps one pair of factors for all experts of a layer: A is [E * r, in] with the
expert outermost, B is [out, r * E] with the expert innermost. Files made before that, and the ones
written here, hold a pair for each expert's w1, w2 and w3; PEFT reads those on either version, but
for w1 and w3 without w2, which it misplaces: these are written fused.
"""

import dataclasses
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.weights.lora_config import LoraConfig, lora_scale

_EXPERTS = ("gate_up_proj", "down_proj")


def to_experts(
    config: ModelConfig, raw: dict[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors with each expert's own modules; others pass through.

    w1 and w3 are the halves of `gate_up_proj` and share its A; where B is block-diagonal, as PEFT
    makes it from an adapter that had them apart, they get back their own ranks.
    """
    targets = raw.get("target_parameters")
    if not targets:
        return raw, tensors
    modules = raw.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"target_parameters is {targets!r}; give a list of parameter names")
    known = {target.removeprefix("mlp.").removeprefix("experts.") for target in targets}
    unknown = known - {*_EXPERTS, "gate.weight"}
    if unknown or not isinstance(modules, list | None):
        raise ValueError(
            f"target_parameters {targets!r} of the adapter beside target_modules "
            f"{modules!r} cannot be read; known parameters are gate_up_proj, "
            f"down_proj and gate.weight, beside a list of modules"
        )
    lora = LoraConfig(
        r=raw["r"],
        lora_alpha=raw["lora_alpha"],
        use_rslora=raw.get("use_rslora") or False,
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
    )
    given = set(tensors)
    tensors = dict(tensors)
    layers = [f"model.layers.{layer}" for layer in range(config.num_hidden_layers)]
    ranks: dict[str, list[int]] = {}
    alphas: dict[str, list[float]] = {}
    for name in [name for name in _EXPERTS if name in known]:
        # With both adapted, PEFT wraps gate_up_proj first and down_proj around it.
        inner = ".base_layer" if name == "gate_up_proj" and "down_proj" in known else ""
        pairs = [
            _per_expert(config, tensors, f"{layer}.mlp.experts{inner}", name) for layer in layers
        ]
        apart = name == "gate_up_proj" and all(_is_block_diagonal(*pair) for pair in pairs)
        for layer, pair in zip(layers, pairs, strict=True):
            full = f"{layer}.mlp.experts.{name}"
            if (rank := pair[0].shape[1]) != lora.rank_of(full):
                raise ValueError(
                    f"the adapter of {full} has rank {rank}, but r and rank_pattern make it "
                    f"{lora.rank_of(full)}"
                )
            for module, (a, b) in _modules(name, *pair, apart=apart).items():
                one = lora_scale(a.shape[1], 1.0, lora.use_rslora)
                ranks.setdefault(module, []).append(a.shape[1])
                alphas.setdefault(module, []).append(lora.scale_of(full) / one)
                for expert in range(len(a)):
                    prefix = f"{layer}.block_sparse_moe.experts.{expert}.{module}"
                    tensors[f"{prefix}.lora_A.weight"] = a[expert]
                    tensors[f"{prefix}.lora_B.weight"] = b[expert]
    if "gate.weight" in known:
        for layer in layers:
            ranks.setdefault("gate", []).append(lora.rank_of(f"{layer}.mlp.gate.weight"))
            alphas.setdefault("gate", []).append(lora.alpha_of(f"{layer}.mlp.gate.weight"))
            for factor in ("lora_A.weight", "lora_B.weight"):
                tensor = _take(tensors, f"{layer}.mlp.gate.{factor}")
                tensors[f"{layer}.block_sparse_moe.gate.{factor}"] = tensor
    return _described(raw, ranks, alphas, set(tensors) - given), tensors


def _take(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"the adapter covers {name} by its target_parameters, but lacks it")
    return tensors.pop(name)


def _per_expert(
    config: ModelConfig, tensors: dict[str, np.ndarray], prefix: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """A [E, r, in] and B [E, out, r]."""
    assert config.moe is not None
    experts = config.moe.num_local_experts
    a = _take(tensors, f"{prefix}.lora_A.weight")
    b = _take(tensors, f"{prefix}.lora_B.weight")
    d, f = config.hidden_size, config.intermediate_size
    out, inner = (2 * f, d) if name == "gate_up_proj" else (d, f)
    rank = a.size // (experts * inner)
    if not rank or a.shape != (rank * experts, inner) or b.shape != (out, rank * experts):
        raise ValueError(
            f"the adapter of {prefix} ({name}) has factors {a.shape} and {b.shape}; for {experts} "
            f"experts they must be [{experts} r, {inner}] and [{out}, {experts} r]"
        )
    return a.reshape(experts, rank, inner), b.reshape(out, rank, experts).transpose(2, 0, 1)


def _is_block_diagonal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the first half of the rank serves only w1 and the second only w3."""
    up, half = b.shape[1] // 2, a.shape[1] // 2
    return a.shape[1] % 2 == 0 and not (b[:, :up, half:].any() or b[:, up:, :half].any())


def _modules(
    name: str, a: np.ndarray, b: np.ndarray, *, apart: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if name == "down_proj":
        return {"w2": (a, b)}
    up, half = b.shape[1] // 2, a.shape[1] // 2
    w1, w3 = b[:, :up], b[:, up:]
    if apart:
        return {"w1": (a[:, :half], w1[:, :, :half]), "w3": (a[:, half:], w3[:, :, half:])}
    return {"w1": (a, w1), "w3": (a, w3)}


def _described(
    raw: dict[str, Any],
    ranks: dict[str, list[int]],
    alphas: dict[str, list[float]],
    added: set[str],
) -> dict[str, Any]:
    """ranks and alphas: of each layer, by module; `added` are the tensors by their names in
    modules."""
    fused = tuple(_EXPERTS)

    def kept(patterns: dict[str, Any] | None) -> dict[str, Any]:
        # Patterns for the fused parameters have done their work.
        return {k: v for k, v in (patterns or {}).items() if not k.endswith(fused)}

    # PEFT takes the parameters of all layers; only modules in full are not held to a list of them.
    is_listed = raw.get("layers_to_transform") not in (None, [])
    modules = sorted({name.partition(".lora_")[0] for name in added}) if is_listed else ranks
    return {
        **raw,
        "target_parameters": None,
        "target_modules": [*(raw.get("target_modules") or []), *modules],
        "rank_pattern": {**_patterns(ranks), **kept(raw.get("rank_pattern"))},
        "alpha_pattern": {**_patterns(alphas), **kept(raw.get("alpha_pattern"))},
    }


def _patterns(values: dict[str, list[Any]]) -> dict[str, Any]:
    """By module where all layers have the same, else by layer too."""
    patterns = {}
    for module, of_layers in values.items():
        if len(set(of_layers)) == 1:
            patterns[module] = of_layers[0]
        else:
            for layer, value in enumerate(of_layers):
                patterns[rf"layers\.{layer}\..*\.{module}"] = value
    return patterns


def fuse_without_down(
    config: ModelConfig, lora: LoraConfig, values: dict[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the tensors with w1 and w3 as one `gate_up_proj`, where w2 has no
    adapter; others pass through.

    An A that both have, as `to_experts` gives it, is written once.
    """
    if "w1" not in lora.target_modules or "w2" in lora.target_modules:
        return values, tensors
    assert config.moe is not None
    tensors = dict(tensors)
    layers = [f"model.layers.{layer}" for layer in range(config.num_hidden_layers)]
    experts = [f"block_sparse_moe.experts.{e}" for e in range(config.moe.num_local_experts)]

    def stacked(name: str) -> np.ndarray:
        """Over layers and experts."""
        return np.stack(
            [
                [tensors.pop(f"{layer}.{expert}.{name}.weight") for expert in experts]
                for layer in layers
            ]
        )

    a1, a3 = stacked("w1.lora_A"), stacked("w3.lora_A")
    b1, b3 = stacked("w1.lora_B"), stacked("w3.lora_B")
    if np.array_equal(a1, a3):
        a, b = a1, np.concatenate([b1, b3], axis=-2)
    else:
        nothing = np.zeros_like(b1)
        a, b = np.concatenate([a1, a3], axis=-2), np.block([[b1, nothing], [nothing, b3]])
    for layer, layer_a, layer_b in zip(layers, a, b, strict=True):
        prefix = f"{layer}.mlp.experts"
        tensors[f"{prefix}.lora_A.weight"] = layer_a.reshape(-1, a.shape[-1])
        tensors[f"{prefix}.lora_B.weight"] = layer_b.transpose(1, 2, 0).reshape(b.shape[-2], -1)
    rank = a.shape[-2]
    alpha = lora.alpha_of(f"{layers[0]}.{experts[0]}.w1") * (rank // a1.shape[-2])

    def fused(patterns: dict[str, Any], value: float) -> dict[str, Any]:
        others = {k: v for k, v in patterns.items() if k not in ("w1", "w3")}
        return {**others, "gate_up_proj": value}

    return {
        **values,
        "target_modules": [m for m in values["target_modules"] if m not in ("w1", "w3")],
        "target_parameters": ["mlp.experts.gate_up_proj"],
        "rank_pattern": fused(values["rank_pattern"], rank),
        "alpha_pattern": fused(values["alpha_pattern"], alpha),
    }, tensors


def with_one_rank(parts: dict[str, Any]) -> dict[str, Any]:
    """The parts of an adapter with one rank for all that PEFT fuses: experts, and the router.

    Smaller factors are padded with zeros, which changes nothing. Raises ValueError for what PEFT
    cannot fuse: w1 without w3 or the reverse, experts left out, or unequal scales.
    """
    paths = [path for path in parts if "block_sparse_moe" in path]
    if not paths:
        return parts
    if any(parts[path].use_rslora for path in paths):
        raise ValueError(
            "PEFT cannot load an rsLoRA adapter on experts right: fusing w1 with w3 it doubles "
            "rank and alpha, which changes alpha / sqrt(r). Merge the adapter and export the model"
        )
    ranks = {rank for path in paths for rank in parts[path].ranks}
    scales = {float(s) for path in paths for s in np.asarray(parts[path].scale).flat}
    halves = {path.split(".")[-2] for path in paths} & {"w1", "w3"}
    if len(scales) > 1 or len(halves) == 1 or 0 in ranks:
        raise ValueError(
            f"PEFT cannot load this adapter on experts: it fuses w1 with w3 and needs both, in all "
            f"layers and experts, with one scale for them, w2 and the router. Here are "
            f"{', '.join(paths)} with ranks {sorted(ranks)} and scales {sorted(scales)}"
        )
    return {
        path: _padded(part, max(ranks)) if path in paths else part for path, part in parts.items()
    }


def _padded(part: Any, rank: int) -> Any:
    added = rank - part.lora_a.shape[-2]
    stack = [(0, 0)] * (part.lora_a.ndim - 2)
    return dataclasses.replace(
        part,
        lora_a=np.pad(np.asarray(part.lora_a), [*stack, (0, added), (0, 0)]),
        lora_b=np.pad(np.asarray(part.lora_b), [*stack, (0, 0), (0, added)]),
        ranks=(rank,) * len(part.ranks),
    )
