"""report.html: a run on one page that needs nothing else to be looked at."""

import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.attempts import RUN_CAUSES

_WIDTH, _HEIGHT, _MARGIN = 640, 220, 56

# What is drawn, where the metrics hold it: title, and the names of one or two curves.
_CURVES = (
    ("Loss", ("loss", "eval_loss")),
    ("Balancing loss of the router", ("aux_loss",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
    ("Tokens per second", ("tokens_per_second",)),
    ("Model FLOPs utilization", ("mfu",)),
    ("Seconds a step", ("step_seconds",)),
)
_COLORS = ("#1f6feb", "#d1242f")
# One for each cause of time, steps first.
_CAUSE_COLORS = (
    "#1a7f37", "#bf8700", "#8250df", "#0969da", "#57606a", "#8c959f", "#cf222e", "#bc4c00",
    "#d0d7de", "#fd8c73", "#24292f",
)  # fmt: skip

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 720px; margin: 2em auto; padding: 0 1em;
  color: #1f2328; background: #fff; }
h1, h2 { font-weight: 600; } table { border-collapse: collapse; }
td { padding: .15em 1.5em .15em 0; vertical-align: top; }
pre { white-space: pre-wrap; background: #f6f8fa; padding: 1em; border-radius: 6px; }
mark { background: #b4f1c0; } svg { width: 100%; height: auto; } svg text { font-size: 12px; }
"""


def write_report(
    path: Path,
    *,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    data: Mapping[str, Mapping[str, Any]],
    sample: Sequence[tuple[str, bool]],
    counters: Mapping[str, int],
    parameters: tuple[int, int],
    goodput: Mapping[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
    generations: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Curves, where the time went, data counts, one sample with its trained text marked, what the
    model said, what it ran on, and the resolved config.

    sample: runs of (text, trained). parameters: (trained, all). goodput: what goodput.json holds.
    machine: name -> what is there. generations: entries of generations.jsonl.
    """
    trained, total = parameters
    facts = {
        "model": config["model"]["name"],
        "method": config["method"],
        "parameters": f"{total:,}, of which {trained:,} are trained",
        "steps": f"{metrics[-1]['step'] if metrics else 0} of {config['train']['steps']}",
        **_totals(metrics),
        **{name.replace("_", " "): value for name, value in counters.items()},
    }
    charts = [chart(title, metrics, names) for title, names in _CURVES]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>{_escape(config['output'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_escape(config['output'])}</h1>",
        _table(facts),
        *charts,
        _time(goodput) if goodput is not None else "",
        *(f"<h2>Data: {_escape(name)}</h2>{_table(counts)}" for name, counts in data.items()),
        "<h2>A sample</h2><p>Marked text is trained.</p>",
        f"<pre>{_marked(sample)}</pre>",
        _said(generations),
        f"<h2>Machine</h2>{_table(machine)}" if machine is not None else "",
        f"<h2>Config</h2><pre>{_escape(json.dumps(config, indent=2))}</pre>",
        "</body></html>",
    ]
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    temporary.replace(path)


def _totals(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of the whole run: tokens, the last losses, the middle one of the speeds."""

    def numbers(name: str) -> list[float]:
        return [entry[name] for entry in metrics if _is_number(entry.get(name))]

    facts = {}
    if tokens := numbers("tokens"):
        facts["tokens"] = f"{sum(tokens):,.0f}"
    for name, title in (("loss", "loss at the end"), ("eval_loss", "evaluation loss at the end")):
        if values := numbers(name):
            facts[title] = f"{values[-1]:.4f}"
    if speeds := numbers("tokens_per_second"):
        facts["tokens per second"] = f"{statistics.median(speeds):,.0f}, the median"
    if shares := numbers("mfu"):
        facts["model FLOPs utilization"] = f"{statistics.median(shares):.1%}, the median"
    return facts


def _time(goodput: Mapping[str, Any]) -> str:
    """A bar of the wall time by cause, and the same as a table."""
    wall = goodput["wall_seconds"]
    colors = dict(zip(RUN_CAUSES, _CAUSE_COLORS, strict=True))
    spent = {name: value for name, value in goodput["seconds"].items() if value > 0}
    parts, left, rows = [], 0.0, []
    for name, seconds in spent.items():
        width = _WIDTH * seconds / wall
        parts.append(
            f"<rect x='{left:.2f}' y='0' width='{width:.2f}' height='24' fill='{colors[name]}'>"
            f"<title>{_escape(RUN_CAUSES[name])}</title></rect>"
        )
        left += width
        mark = f"<span style='color:{colors[name]}'>■</span>"
        rows.append(
            f"<tr><td>{mark} {_escape(RUN_CAUSES[name])}</td><td>{seconds:,.1f} s</td>"
            f"<td>{seconds / wall:.1%}</td></tr>"
        )
    return (
        f"<h2>Time</h2><p>{goodput['goodput']:.1%} of {wall:,.1f} seconds went into steps; since "
        f"the loop began, {goodput['loop_goodput']:.1%}. Starts of the run: "
        f"{len(goodput['attempts'])}.</p><svg viewBox='0 0 {_WIDTH} 24' role='img' "
        f"aria-label='Time'>{''.join(parts)}</svg><table>{''.join(rows)}</table>"
    )


def _said(generations: Sequence[Mapping[str, Any]]) -> str:
    """The prompts and what the model made of them, the latest step open."""
    steps = sorted({entry["step"] for entry in generations}, reverse=True)
    blocks = []
    for step in steps:
        texts = "".join(
            f"<pre>{_escape(entry['prompt'])}<mark>{_escape(entry['text'])}</mark></pre>"
            for entry in generations
            if entry["step"] == step
        )
        is_open = " open" if step == steps[0] else ""
        blocks.append(f"<details{is_open}><summary>step {step}</summary>{texts}</details>")
    if not blocks:
        return ""
    return f"<h2>Generations</h2><p>Marked text is the model's.</p>{''.join(blocks)}"


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _marked(sample: Sequence[tuple[str, bool]]) -> str:
    return "".join(
        f"<mark>{_escape(text)}</mark>" if trained else _escape(text) for text, trained in sample
    )


def _table(facts: Mapping[str, Any]) -> str:
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{count} {reason}" for reason, count in value.items()) or "none"
        rows.append(f"<tr><td>{_escape(name)}</td><td>{_escape(value)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def chart(title: str, metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A line chart of the named numbers over steps as SVG; empty where there are none."""
    curves = {
        name: [(e["step"], e[name]) for e in metrics if _is_number(e.get(name))] for name in names
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    points = [point for curve in curves.values() for point in curve]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> str:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        inner_width, inner_height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * 24
        return f"{_MARGIN + across * inner_width:.1f},{_HEIGHT - 24 - up * inner_height:.1f}"

    lines, legend = [], []
    for color, (name, curve) in zip(_COLORS, curves.items(), strict=False):
        path = " ".join(place(x, y) for x, y in curve)
        lines.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='1.5'/>")
        if len(curve) == 1:
            x, y = place(*curve[0]).split(",")
            lines.append(f"<circle cx='{x}' cy='{y}' r='3' fill='{color}'/>")
        legend.append(f"<tspan fill='{color}'>{_escape(name)} {curve[-1][1]:.4g}</tspan>")
    return (
        f"<h2>{_escape(title)}</h2>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{_escape(title)}'>"
        f"<rect x='{_MARGIN}' y='24' width='{_WIDTH - 2 * _MARGIN}' height='{_HEIGHT - 48}' "
        f"fill='none' stroke='#d0d7de'/>{''.join(lines)}"
        f"<text x='{_MARGIN - 6}' y='32' text-anchor='end'>{high:.3g}</text>"
        f"<text x='{_MARGIN - 6}' y='{_HEIGHT - 24}' text-anchor='end'>{low:.3g}</text>"
        f"<text x='{_MARGIN}' y='{_HEIGHT - 6}'>step {left}</text>"
        f"<text x='{_WIDTH - _MARGIN}' y='{_HEIGHT - 6}' text-anchor='end'>{right}</text>"
        f"<text x='{_MARGIN}' y='16'>{' '.join(legend)}</text></svg>"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
