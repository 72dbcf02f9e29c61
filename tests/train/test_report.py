"""The report's parts, from numbers made by hand."""

import re

from train.attempts import RUN_CAUSES
from train.report import write_report

CONFIG = {"output": "runs/<a>", "model": {"name": "m"}, "method": "lora", "train": {"steps": 4}}


def write(tmp_path, metrics=(), **more):
    path = tmp_path / "report.html"
    write_report(
        path,
        config=CONFIG,
        metrics=metrics,
        data={"train": {"rows": 3, "dropped": {"too long": 2}}},
        sample=[("user", False), ("answer", True)],
        counters={"batches_not_finite": 1},
        parameters=(10, 1000),
        **more,
    )
    return path.read_text()


def goodput(**seconds):
    wall = sum(seconds.values())
    return {
        "wall_seconds": wall,
        "goodput": seconds.get("step", 0) / wall,
        "loop_goodput": 0.9,
        "seconds": {**dict.fromkeys(RUN_CAUSES, 0.0), **seconds},
        "attempts": [{}, {}],
    }


def test_totals_are_of_the_whole_run_and_speeds_the_median(tmp_path):
    metrics = [
        {"step": 1, "tokens": 100.0, "loss": 3.0, "tokens_per_second": 1.0, "mfu": 0.1},
        {"step": 2, "tokens": 100.0, "loss": 2.0, "tokens_per_second": 50.0, "mfu": 0.4},
        {"step": 3, "tokens": 101.0, "loss": None, "tokens_per_second": 60.0, "mfu": 0.5,
         "eval_loss": 2.5},
    ]  # fmt: skip
    page = write(tmp_path, metrics)
    for name, value in {
        "tokens": "301",
        "loss at the end": "2.0000",
        "evaluation loss at the end": "2.5000",
        "tokens per second": "50, the median",
        "model FLOPs utilization": "40.0%, the median",
        "steps": "3 of 4",
        "batches not finite": "1",
    }.items():
        assert f"<td>{name}</td><td>{value}</td>" in page
    assert "<h2>Model FLOPs utilization</h2>" in page and "<h2>Gradient norm</h2>" not in page


def test_time_is_a_bar_of_its_causes(tmp_path):
    page = write(tmp_path, goodput=goodput(step=60.0, compile=30.0, save=10.0))
    assert "60.0% of 100.0 seconds went into steps" in page
    bar = page[page.index("<svg viewBox='0 0 640 24'") : page.index("</svg>")]
    widths = [float(width) for width in re.findall(r"width='([\d.]+)'", bar)]
    assert widths == [384.0, 64.0, 192.0] and sum(widths) == 640
    assert "compiling</td><td>30.0 s</td><td>30.0%</td>" in page
    assert "Starts of the run: 2." in page
    assert "waiting for the next batch" not in page, "a cause that took no time"


def test_without_steps_there_is_still_a_page(tmp_path):
    page = write(tmp_path)
    assert "<td>0 of 4</td>" in page and "<h2>Time" not in page and "<h2>Generations" not in page
    assert "runs/&lt;a&gt;" in page and "<mark>answer</mark>" in page
    assert "2 too long" in page


def test_generations_by_step_the_latest_open_and_escaped(tmp_path):
    said = [{"step": step, "prompt": "<p>", "text": f"text {step} & more"} for step in (10, 20)]
    page = write(tmp_path, generations=said, machine={"devices": "4 × <TPU>"})
    first, second = page.index("<details open><summary>step 20"), page.index("<summary>step 10")
    assert first < second
    assert "&lt;p&gt;<mark>text 20 &amp; more</mark>" in page and "4 × &lt;TPU&gt;" in page
