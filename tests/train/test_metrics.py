"""metrics.jsonl across restarts, and charts."""

import pytest

from tests.train.test_loop import ONE_DEVICE, config
from train.build import build
from train.metrics import Clock, MetricsWriter, make_clock, read_metrics, token_flops
from train.report import chart


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write({"step": 1, "loss": float("nan"), "tokens": 3.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "tokens": 3.0}\n'


def test_steps_that_are_trained_again_are_written_anew(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write({"step": 3, "loss": 2.0})
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [(e["step"], e["loss"]) for e in entries] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_broken_line_that_is_not_the_last_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_metrics(path)


def test_the_clock_counts_from_its_last_restart(monkeypatch):
    times = iter([0.0, 5.0, 7.0])
    monkeypatch.setattr("train.metrics.time.perf_counter", lambda: next(times))
    clock = Clock()
    clock.restart()
    assert clock.lap(10.0) == {"step_seconds": 2.0, "tokens_per_second": 5.0}


def test_with_flops_and_a_peak_the_clock_tells_the_utilization(monkeypatch):
    times = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr("train.metrics.time.perf_counter", lambda: next(times))
    clock = Clock(token_flops=6e11, peak_flops=4 * 1e12)
    assert clock.lap(10.0)["mfu"] == 0.75


def test_no_utilization_where_the_peak_is_not_known(monkeypatch):
    times = iter([0.0, 2.0])
    monkeypatch.setattr("train.metrics.time.perf_counter", lambda: next(times))
    assert "mfu" not in Clock(token_flops=6e12).lap(10.0)


def test_the_operations_of_a_token_are_six_for_each_weight_and_what_it_attends_to(tmp_path):
    _, setup, _ = build(config(tmp_path, method="full", mesh=ONE_DEVICE))
    model, length = setup.config, setup.run.train.sequence_length
    layer = 2 * model.hidden_size**2 + 2 * model.hidden_size * 2 * 8  # q, o, k, v
    layer += 3 * model.hidden_size * model.intermediate_size
    weights = 2 * layer + model.vocab_size * model.hidden_size
    # Scores and values, twice an operation, forward once and backward twice, half of the keys.
    attention = 2 * 3 * 4 * model.hidden_size * (length + 1) / 2
    assert token_flops(setup) == pytest.approx(6 * weights + attention)


def test_a_clock_for_devices_of_a_known_kind_has_the_peak_of_all(tmp_path, monkeypatch):
    _, setup, _ = build(config(tmp_path, mesh={"fsdp": 2, "cpu_devices": 2}))
    monkeypatch.setattr("train.metrics.peak_flops", lambda kind: 1e9 if kind == "cpu" else None)
    monkeypatch.setattr("train.metrics.time.perf_counter", iter([0.0, 1.0]).__next__)
    assert make_clock(setup).lap(10.0)["mfu"] == 10.0 * token_flops(setup) / 2e9


def test_a_chart_has_a_curve_for_each_number_and_is_empty_without_any():
    metrics = [{"step": n, "loss": 4.0 - n, "eval_loss": None} for n in range(1, 4)]
    drawn = chart("Loss", metrics, ("loss", "eval_loss"))
    assert drawn.count("<polyline") == 1 and "step 1" in drawn
    points = drawn.split("points='")[1].split("'")[0].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights), "a falling loss goes down the page"
    assert chart("Loss", metrics, ("nothing",)) == ""
    single = chart("Loss", [{"step": 1, "loss": 2.0}], ("loss",))
    assert "<circle" in single
