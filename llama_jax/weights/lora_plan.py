"""Which weights a LoRA configuration changes, and the other way round.

Modules are matched by their Hugging Face names (`model.layers.0.self_attn.q_proj`) with PEFT's
rules, so that a configuration means the same here and there. Source of the rules: PEFT 0.21,
`tuners_utils.check_target_module_exists`, `other.get_pattern_key` and `other._set_trainable`.
"""

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.weights.lora_config import LoraConfig, lora_scale, pattern_names, used_keys
from llama_jax.weights.table import Weight, weight_table


@dataclass(frozen=True)
class AdapterPlan:
    """Which weights an adapter changes.

    ranks and scales: by path, one number for each matrix of the stack (shape [], [L] or [L, E]),
    rank 0 where there is none. saved: the paths of weights trained whole.
    """

    ranks: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    saved: frozenset[str]
    use_rslora: bool


def module_names(row: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(Hugging Face module name, index into the stack) of each matrix of a weight."""
    for name, index in row.hf_names():
        yield name.rpartition(".")[0], index


def names_module(name: str, module: str, *, by_ending: bool = False) -> bool:
    """Whether an entry of a list means this module: as its whole name or its last parts; with
    `by_ending` (modules_to_save) as the bare end of it or of a module around it."""
    if not by_ending:
        return module == name or module.endswith(f".{name}")
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts) + 1))


def plan_adapter(config: ModelConfig, lora: LoraConfig) -> AdapterPlan:
    """Raises ValueError, naming the entry, for whatever does not fit this model."""
    _check_layer_range(config, lora)
    _check_tying(config, lora)
    rows = weight_table(config)
    saved = _saved_paths(config, lora, rows)
    ranks: dict[str, np.ndarray] = {}
    scales: dict[str, np.ndarray] = {}
    for path, row in rows.items():
        if row.role in ("norm", "bias"):
            continue
        stack = row.shape[:-2]
        rank, scale = np.zeros(stack, np.int64), np.zeros(stack, np.float64)
        for module, index in module_names(row):
            if _is_target(config, lora, row, module):
                rank[index], scale[index] = lora.rank_of(module), lora.scale_of(module)
        if rank.any() and path in saved:
            raise ValueError(
                f"{path} is in lora.target_modules and, by the end of its name, in "
                f"modules_to_save {lora.modules_to_save!r}; leave it out of one of them"
            )
        if rank.any():
            ranks[path], scales[path] = rank, scale
    _check_names(config, lora, rows)
    _check_effects(config, lora)
    _check_patterns(config, lora)
    if not ranks:
        raise ValueError(
            f"lora.target_modules {lora.target_modules!r} matches no module of this model; its "
            f"modules are {', '.join(_short_names(rows))}"
        )
    return AdapterPlan(ranks, scales, saved, lora.use_rslora)


def adapted_modules(config: ModelConfig, lora: LoraConfig) -> list[str]:
    """The names of all modules that get low-rank factors."""
    return [
        module
        for row in weight_table(config).values()
        if row.role not in ("norm", "bias")
        for module, _ in module_names(row)
        if _is_target(config, lora, row, module)
    ]


def idle_names(config: ModelConfig, lora: LoraConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of target_modules that mean no module of layers_to_transform, and those of
    exclude_modules that mean no module of target_modules; a regular expression is one name."""
    bare = dataclasses.replace(lora, exclude_modules=(), modules_to_save=())
    targets = adapted_modules(config, bare)
    names = [name for module in targets for name in _aliases(config, lora, module)]

    def idle(field_name: str) -> tuple[str, ...]:
        given = getattr(lora, field_name)
        if isinstance(given, str):
            return () if any(_matches(given, name) for name in names) else (given,)
        return tuple(one for one in given if not any(names_module(one, name) for name in names))

    return () if lora.is_all_linear else idle("target_modules"), idle("exclude_modules")


def _is_target(config: ModelConfig, lora: LoraConfig, row: Weight, module: str) -> bool:
    names = _aliases(config, lora, module)
    if any(_matches(lora.exclude_modules, name) for name in names):
        return False
    if any(f".{name}." in f".{module}." for name in lora.modules_to_save):
        return False  # trained whole, so not by an adapter too
    if lora.is_all_linear:
        found = row.role in ("matrix", "router")
    else:
        found = any(_matches(lora.target_modules, name) for name in names)
    layers = lora.layers_to_transform
    if not found or layers is None or module in lora.target_modules:
        return found  # a module named in full is meant whatever its layer
    match = re.match(r"model\.layers\.(\d+)\.", module)
    return match is not None and int(match.group(1)) in layers


def _aliases(config: ModelConfig, lora: LoraConfig, module: str) -> list[str]:
    """A tied head is the embedding by another name."""
    if config.tie_word_embeddings and lora.ensure_weight_tying and module.endswith("embed_tokens"):
        return [module, "lm_head"]
    return [module]


def _matches(targets: str | tuple[str, ...], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(names_module(target, module) for target in targets)


def _saved_paths(
    config: ModelConfig, lora: LoraConfig, rows: Mapping[str, Weight]
) -> frozenset[str]:
    saved = set()
    for path, row in rows.items():
        hits = [
            any(
                names_module(name, alias, by_ending=True)
                for alias in _aliases(config, lora, module)
                for name in lora.modules_to_save
            )
            for module, _ in module_names(row)
        ]
        if not any(hits):
            continue
        if "block_sparse_moe" in path:
            raise ValueError(
                f"lora.modules_to_save covers {path}, but routers and experts cannot be saved "
                f"whole: PEFT on transformers 5 has no such modules. Adapt them instead "
                f"(target_modules gate, w1, w2, w3)"
            )
        if not all(hits):
            raise ValueError(
                f"lora.modules_to_save covers {path} in some layers only; layers are one array "
                f"and are saved together, so name the module without its layer"
            )
        saved.add(path)
    return frozenset(saved)


def _check_names(config: ModelConfig, lora: LoraConfig, rows: Mapping[str, Weight]) -> None:
    """Every name in a list must mean something."""
    modules = {module: row for row in rows.values() for module, _ in module_names(row)}
    for field_name in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(lora, field_name)
        if isinstance(names, str):
            continue
        by_ending = field_name == "modules_to_save"
        for name in names:
            found = [
                module
                for module in modules
                for alias in _aliases(config, lora, module)
                if names_module(name, alias, by_ending=by_ending)
            ]
            if not found:
                raise ValueError(
                    f"lora.{field_name}: this model has no module {name!r}"
                    f"{_suggestion(config, name, rows)}"
                )
            if field_name == "target_modules" and all(modules[m].role == "norm" for m in found):
                raise ValueError(
                    f"lora.target_modules: {name!r} is a norm, which has no matrix to adapt; put "
                    f"it in modules_to_save"
                )


def _check_effects(config: ModelConfig, lora: LoraConfig) -> None:
    untargeted, unexcluded = idle_names(config, lora)
    if untargeted and lora.layers_to_transform is not None:
        raise ValueError(
            f"lora.target_modules: {untargeted[0]!r} is in none of the layers that "
            f"layers_to_transform {list(lora.layers_to_transform)} names; give its whole name "
            f"(model.…), or leave one of the two out"
        )
    if unexcluded:
        raise ValueError(
            f"lora.exclude_modules: {unexcluded[0]!r} leaves out nothing that target_modules "
            f"{lora.target_modules!r} names; remove it"
        )


def _check_patterns(config: ModelConfig, lora: LoraConfig) -> None:
    modules = adapted_modules(config, lora)
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(lora, field_name)
        used = used_keys(patterns, modules)
        for key in patterns:
            if key in used:
                continue
            if any(pattern_names(key, module) for module in modules):
                raise ValueError(
                    f"lora.{field_name}: {key!r} decides nothing, because keys before it are "
                    f"about the same modules; put it before them, or remove it"
                )
            raise ValueError(
                f"lora.{field_name}: {key!r} is the end of no module's name that gets an adapter; "
                f"adapters are on {', '.join(sorted({_last(m) for m in modules}))}"
            )


def _short_names(rows: Mapping[str, Weight]) -> list[str]:
    return sorted({path.rpartition(".")[0].rpartition(".")[2] for path in rows})


def _suggestion(config: ModelConfig, name: str, rows: Mapping[str, Weight]) -> str:
    if config.tie_word_embeddings and name.endswith("lm_head"):
        return (
            ": its head is the embedding. Name embed_tokens and set ensure_weight_tying, or untie "
            "them first"
        )
    short = _short_names(rows)
    near = difflib.get_close_matches(name.rpartition(".")[2], short, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; its modules are {', '.join(short)}"


def _check_layer_range(config: ModelConfig, lora: LoraConfig) -> None:
    for layer in lora.layers_to_transform or ():
        if layer >= config.num_hidden_layers:
            raise ValueError(
                f"lora.layers_to_transform holds {layer}, but the model has "
                f"{config.num_hidden_layers} layers, 0 to {config.num_hidden_layers - 1}"
            )


def _check_tying(config: ModelConfig, lora: LoraConfig) -> None:
    if lora.ensure_weight_tying and not config.tie_word_embeddings:
        raise ValueError(
            "lora.ensure_weight_tying is set, but this model's head and embedding are not tied; "
            "remove it"
        )
    if lora.ensure_weight_tying or not config.tie_word_embeddings:
        return
    embedding = "model.embed_tokens"
    touched = any(embedding.endswith(name) for name in lora.modules_to_save) or (
        not lora.is_all_linear and _matches(lora.target_modules, embedding)
    )
    if touched:
        raise ValueError(
            "this model's embedding is also its head, and the adapter changes it. Set "
            "ensure_weight_tying for one adapter that serves both, or call "
            "untie_embeddings first to give the head its own weight (what PEFT does silently)"
        )


def describe_plan(config: ModelConfig, plan: AdapterPlan) -> LoraConfig:
    """A short configuration that means this plan; the inverse of `plan_adapter`.

    r and lora_alpha are the most frequent ones, exceptions become patterns, and modules are named
    by their last part where all layers have them. Raises ValueError if none means exactly this.
    """
    if not plan.ranks:
        raise ValueError("there is no LoRA adapter to describe: no weight has low-rank factors")
    rows = weight_table(config)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    left_out: set[str] = set()
    for path, stack in plan.ranks.items():
        for module, index in module_names(rows[path]):
            if not stack[index]:
                left_out.add(module)
                continue
            ranks[module] = int(stack[index])
            alphas[module] = _alpha(plan.scales[path][index], ranks[module], plan.use_rslora)
    rank, alpha = _most_frequent(ranks), _most_frequent(alphas)
    saved = [rows[path].hf_name.rpartition(".")[0] for path in sorted(plan.saved)]
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=plan.use_rslora,
        target_modules=tuple(_short(ranks, left_out)),
        rank_pattern=_exceptions(ranks, rank),
        alpha_pattern=_exceptions(alphas, alpha),
        modules_to_save=tuple(dict.fromkeys(name.rpartition("{layer}.")[2] for name in saved)),
        ensure_weight_tying=config.tie_word_embeddings
        and "embed_tokens.weight" in {*plan.ranks, *plan.saved},
    )
    _check_described(plan, plan_adapter(config, lora))
    return lora


def _alpha(scale: float, rank: int, use_rslora: bool) -> float:
    """The number with the fewest digits that gives this float32 scale."""
    exact = float(scale) / lora_scale(rank, 1.0, use_rslora)
    for digits in range(1, 18):
        alpha = float(f"{exact:.{digits}g}")
        if np.float32(lora_scale(rank, alpha, use_rslora)) == np.float32(scale):
            return int(alpha) if alpha.is_integer() else alpha
    return exact


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _most_frequent(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _short(modules: Mapping[str, Any], left_out: set[str]) -> list[str]:
    partial = {_last(module) for module in left_out}
    return sorted({m if _last(m) in partial else _last(m) for m in modules})


def _exceptions(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    by_name: dict[str, set[Any]] = {}
    for module, value in values.items():
        by_name.setdefault(_last(module), set()).add(value)
    patterns = {}
    for module, value in values.items():
        if value != default:
            patterns[_last(module) if len(by_name[_last(module)]) == 1 else module] = value
    return dict(sorted(patterns.items()))


def _check_described(plan: AdapterPlan, described: AdapterPlan) -> None:
    same = plan.saved == described.saved and plan.ranks.keys() == described.ranks.keys()
    for path in plan.ranks if same else ():
        same &= np.array_equal(plan.ranks[path], described.ranks[path])
        same &= np.array_equal(
            plan.scales[path].astype(np.float32), described.scales[path].astype(np.float32)
        )
    if not same:
        raise ValueError(
            f"PEFT's configuration cannot say what this adapter covers: low-rank factors on "
            f"{', '.join(plan.ranks)}, whole weights {', '.join(sorted(plan.saved)) or 'none'}"
        )
