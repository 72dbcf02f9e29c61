"""`fit --serve`: a server's steps compiled for TPU slices, and what its cache can hold there."""

import argparse
from typing import Any

from llama_jax.commands import run_config


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    from infer.server.settings_reader import read_settings
    from llama_jax.commands.fit import start_compiler
    from llama_jax.commands.report import Progress
    from llama_jax.mesh.slices import slice_named

    for name in ("search", "memory_table"):
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is about training; --serve finds what fits by itself")
    path = run_config.find_serve_config(args.config)
    settings = read_settings(_overrides(args.overrides), config=path, environment={})
    named = args.slice or ([settings.slice] if settings.slice else [])
    if not named:
        raise ValueError(f"{path} names no slice; give one with --slice, such as v5e-4")
    slices = [slice_named(name) for name in named]
    start_compiler(args.save_cache)
    from infer.fit.trial import fit

    progress = Progress()
    return [fit(settings, each, progress.say).to_dict() for each in slices]


def _overrides(texts: list[str]) -> dict[str, Any]:
    """Settings given as key=value. Raises ValueError."""
    from infer.server.settings import setting_names
    from infer.server.settings_reader import from_text

    values = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in setting_names():
            raise ValueError(f"{text!r} is no setting of a server; write max_slots=32 or the like")
        values[name] = from_text(name, value, name)
    return values


def show(report: list[dict[str, Any]]) -> None:
    from llama_jax.commands.fit import title
    from llama_jax.commands.report import print_table

    for each in report:
        print_table(title(each), ("a chip", "value"), _rows(each))
        columns = ("step", "rows x tokens", "temporaries", "operations", "bound s", "by", "s")
        print_table("Steps", columns, [_step(step) for step in each["steps"]])
        for line in each["advice"]:
            print(f"  {line}")


def _rows(each: dict[str, Any]) -> list[tuple[str, str]]:
    from llama_jax.commands.fit import gib

    slots, context = each["max_slots"], each["max_context"]
    rows = [
        ("weights", gib(each["weights_bytes_per_chip"])),
        *(
            (name, gib(each[key]))
            for name, key in (
                ("adapters", "adapters_bytes_per_chip"),
                ("draft model, its keys and values", "draft_bytes_per_chip"),
            )
            if each[key]
        ),
        (
            f"cache of {each['cache_tokens']} tokens in {each['cache_dtype']}",
            gib(each["cache_bytes_per_chip"]),
        ),
        ("sampling", gib(each["sampling_bytes_per_chip"])),
        ("temporaries and outputs, at most", gib(each["transient_bytes_per_chip"])),
        ("programs", gib(each["code_bytes_per_chip"])),
        ("together", f"{gib(each['hbm_bytes_per_chip'])} of {gib(each['hbm_limit'])}"),
    ]
    if not each["fits"]:
        rows.append(("missing", gib(each["missing_bytes_per_chip"])))
    rows.append(("tokens that a cache can hold", str(each["largest_cache_tokens"])))
    rows.append((f"  rows of {context} tokens", str(each["largest_slots_of_max_context"])))
    rows.append((f"  tokens each of {slots} rows", str(each["largest_context_of_max_slots"])))
    rows.append((f"operations of a step of {slots} rows", f"{each['flops_per_step']:.4g}"))
    rows.append(
        (
            f"  memory traffic at {each['row_tokens']} tokens a row",
            gib(each["bytes_accessed_per_chip"]),
        )
    )
    for kind, sent in (each["collectives"] or {}).items():
        rows.append((f"  {kind} sends", f"{sent['count']} x, {gib(sent['bytes_per_chip'])}"))
    for name, seconds in each["bound_seconds"].items():
        mark = ", the bound" if name == each["bound_by"] else ""
        rows.append((f"  {name} takes at least", f"{seconds:.4g} s{mark}"))
    rows.append(("new tokens/s at most, all chips", f"{each['bound_tokens_per_second']:.4g}"))
    rows.append(("compiled in", f"{each['compile_seconds']:.1f} s"))
    return rows


def _step(step: dict[str, Any]) -> tuple[str, ...]:
    from llama_jax.commands.fit import gib

    return (
        step["step"],
        f"{step['rows']} x {step['tokens']}",
        gib(step["temporaries_bytes_per_chip"]),
        f"{step['flops']:.4g}",
        f"{max(step['bound_seconds'].values()):.3g}",
        step["bound_by"],
        f"{step['compile_seconds']:.1f}",
    )
