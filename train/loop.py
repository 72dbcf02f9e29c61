"""The training loop: build, go on from the last checkpoint, step, measure, evaluate, save.

The numbers of a step are read while the next one runs, so that the devices never wait for them. A
loss that is not finite is therefore noticed one step later, which costs nothing: the step itself
leaves such an update out.
"""

import contextlib
import json
import logging
import math
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import jax

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats.checkpoint_saver import Saver
from llama_jax.kernels.platforms import check_kernels
from llama_jax.mesh.distributed import Share, barrier, is_main, run_on_main
from train.attempts import Attempts
from train.config import RunConfig
from train.data.build import RunData, build_data
from train.data.pipeline import TrainingBatches, evaluation_batches
from train.data.report import colored, spans
from train.data.row_set import read_run_rows
from train.distill_cache import attach_teacher, needs_cache
from train.distill_teacher import load_teacher, read_teacher
from train.generations import Sampler, read_generations
from train.goodput import Goodput
from train.interrupt import (
    PreemptedError,
    StopRequest,
    TrainingStoppedError,
    make_vote,
    stop_on_signals,
)
from train.lock import locked
from train.machine import describe
from train.metrics import Progress, make_clock, read_metrics
from train.profiler import Profiler, TracedSteps
from train.records import Records
from train.reference import attach_reference, needs_reference
from train.report import write_report
from train.resume import first_state, savable
from train.run_dir import RunDir, open_run_dir, write_config
from train.setup import Setup, make_setup, open_mesh
from train.start import Start, read_start
from train.state import TrainState
from train.weights_and_biases import check_installed

logger = logging.getLogger(__name__)

# Of the samples of a batch this many are named in a message; `stopped.json` has all.
_NAMED_SAMPLES = 20


@dataclass(frozen=True)
class Result:
    """steps: the last step done. final_loss: of the last step with trained tokens, NaN if there
    was none. counters: what was skipped, by reason. params are as trained, adapters apart.
    goodput: see `Goodput.summary`."""

    run_dir: Path
    steps: int
    final_loss: float
    config: ModelConfig
    params: tree.Tree
    tokenizer: Any
    counters: dict[str, int]
    goodput: dict[str, Any]


@dataclass
class _Job:
    """What the parts of the loop share while it runs."""

    start: Start
    setup: Setup
    data: RunData
    batches: TrainingBatches
    folder: RunDir
    share: Share
    saver: Saver
    goodput: Goodput
    sampler: Sampler | None = None
    beside: tuple[tree.Tree, ...] = ()
    counters: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Step:
    """A step that was dispatched: its numbers are still on the devices."""

    number: int
    metrics: dict[str, jax.Array]
    samples: list[int]


@dataclass
class _Stop:
    """Why training ends before its last step: a problem, the step that had it and its numbers, or
    a signal."""

    problem: str | None = None
    step: _Step | None = None
    entry: dict[str, Any] = field(default_factory=dict)
    signal: int = 0

    def __bool__(self) -> bool:
        return self.problem is not None or bool(self.signal)


def dry_run(run: RunConfig) -> dict[str, Any]:
    """Builds everything on shapes, reads the data and lowers the step; nothing is trained, no
    weight is read and no folder written. Returns the counts a user would ask for."""
    _, setup, data = _build(run)
    with jax.set_mesh(setup.mesh):
        lowered = _lower(setup)
    trained, total = setup.num_parameters()
    return {
        "devices": setup.mesh.size,
        "mesh": dict(setup.mesh.shape),
        "parameters": total,
        "trained_parameters": trained,
        "state_bytes": tree.num_bytes(
            [setup.abstract.params, setup.abstract.opt_state, setup.abstract.auxiliary]
        ),
        "data": data.train_report.to_dict(),
        "hlo_lines": lowered.as_text().count("\n"),
    }


def train(
    run: RunConfig,
    *,
    progress: Progress | None = None,
    stop_after: int | None = None,
    sampler: Sampler | None = None,
    profile: TracedSteps | None = None,
) -> Result:
    """Trains as the config says and returns the result; its folder is `run.output`.

    A folder that holds this very run is resumed from its latest checkpoint, with the result of an
    uninterrupted run. stop_after: save and stop when this many steps are done, as a signal would.
    sampler: says what the model makes of `train.sample_prompts`. profile: the steps to trace.

    Of several processes each calls this alike; process 0 alone writes metrics and reports.

    Raises ValueError for a config, data or folder that does not fit, TrainingStoppedError when the
    loss is not finite, PreemptedError when SIGTERM came.
    """
    goodput = Goodput()
    check_installed(run.wandb)
    folder, run = open_run_dir(run)
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(stop_on_signals(run.train.grace_seconds))
        start, setup, data = _build(run)
        run = setup.run
        _show_data(data, start.tokenizer)
        # Until the very end: nobody else may write into the folder before all is said.
        run_on_main("lock", lambda: stack.enter_context(locked(folder.path)))
        share = setup.share(_rows(data, run.train.batch_size))
        batches = data.batches(run, process_index=share.index, process_count=share.count)
        saver = Saver(
            folder.checkpoints,
            config=setup.config,
            mask=setup.mask,
            tokenizer=start.tokenizer,
            keep=run.train.keep_checkpoints,
            keep_best=run.train.keep_best,
        )
        stack.callback(saver.close)
        stack.enter_context(jax.set_mesh(setup.mesh))
        job = _Job(start, setup, data, batches, folder, share, saver, goodput, sampler)
        with goodput.cause("resume"):
            state = first_state(folder.checkpoints, setup, start, batches, job.counters)
            job.beside = load_teacher(setup)
        run_on_main("write the config", lambda: write_config(folder, run))
        if needs_cache(setup):
            with goodput.cause("resume"):
                taught = read_teacher(run, start.tokenizer)
                assert taught is not None
                job.data = attach_teacher(setup, data, taught, folder.path)
            batches.set_plan(job.data.train)
        if needs_reference(setup):
            with goodput.cause("resume"):
                job.data = attach_reference(setup, data, folder.path, state)
            batches.set_plan(job.data.train)
        state = _steps(job, state, request, progress, stop_after, profile)
        return _result(job, state)


def _rows(data: RunData, items: int) -> int:
    return items * data.train.rows_per_item


def _build(run: RunConfig) -> tuple[Start, Setup, RunData]:
    """From what costs least to what costs most, so that mistakes come out early."""
    rows, held_out = read_run_rows(run)
    start = read_start(run)
    run = _dated(run, start.tokenizer)
    teacher = read_teacher(run, start.tokenizer)
    data = build_data(run, rows, held_out, start.tokenizer)
    mesh = open_mesh(run.mesh)
    check_kernels(run.compute, start.config, mesh.devices.flat[0].platform)
    return start, make_setup(run, start.config, start.params, mesh, teacher=teacher), data


def _dated(run: RunConfig, tokenizer: Any) -> RunConfig:
    """The config with the day that templates are told; processes may begin beside midnight."""
    if run.data.template_date is not None or not tokenizer.tells_the_day:
        return run
    day = run_on_main("note the day", lambda: date.today().isoformat())
    return run.replace(data=run.data.replace(template_date=day))


def _lower(setup: Setup) -> Any:
    batch = setup.batch_struct(setup.run.train.batch_size)
    return setup.step.lower(setup.abstract, batch, *setup.beside)


def _show_data(data: RunData, tokenizer: Any) -> None:
    for name, report in (("train", data.train_report), ("evaluation", data.eval_report)):
        for line in report.lines(name) if report is not None else ():
            logger.info("%s", line)
    sample = data.train.samples[0]
    text = colored(sample, tokenizer, ansi=sys.stderr.isatty())
    logger.info("a sample, trained tokens marked:\n%s", text)


# Steps


def _steps(
    job: _Job,
    state: TrainState,
    request: StopRequest,
    progress: Progress | None,
    stop_after: int | None,
    profile: TracedSteps | None,
) -> TrainState:
    run, setup, goodput = job.setup.run.train, job.setup, job.goodput
    first = number = int(state.step)
    with contextlib.ExitStack() as stack:
        report = _Reporter(job, _open_records(job, state, stack), progress, done=first)
        if first >= run.steps:
            logger.info("all %d steps are done already", run.steps)
            report.page()
            return state
        logger.info("compiling the step")
        with goodput.cause("compile"):
            step, vote = _lower(setup).compile(), make_vote(setup.mesh)
        request.noted = True
        running: _Step | None = None
        stop = report.stop
        profiler = _open_profiler(job, profile, first, stack)
        stack.enter_context(goodput.cause("loop"))
        for number in range(first + 1, run.steps + 1):
            with goodput.cause("data"):
                batch = setup.place(next(job.batches), job.share)
            with goodput.cause("step"):
                ballot = vote(request)
                profiler.before(number, running)
                state, metrics = step(state, batch, *job.beside)
                profiler.after(number, metrics)
            before, running = running, _Step(number, metrics, job.batches.samples)
            if before is not None:
                report.step(before, report.read(before))
            stop.signal = ballot()
            is_last = number == run.steps
            evaluating, sampling = _is_evaluated(job, number), _is_sampled(job, number)
            saving = is_last or number == stop_after or _is_due(number, run.checkpoint_every_steps)
            if not (evaluating or sampling or saving or stop):
                continue
            entry = report.read(running)
            # A machine about to go leaves no time; the resumed run makes up for it.
            if evaluating and not stop.signal:
                entry |= _evaluate(job, state)
            if sampling and not stop.signal:
                report.generations(number, _sample(job, state))
            report.step(running, entry)
            running = None
            if saving or stop:
                report.flush()
                _save(job, state, entry.get("eval_loss"))
            if stop or number == stop_after:
                break
            if saving:
                report.page()
            report.clock.restart()
        with goodput.cause("save"):
            saved = job.saver.wait()
        report.stopped(saved)
        report.page()
    _raise_stopped(stop, saved, done=number == run.steps)
    return state


def _is_due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _is_evaluated(job: _Job, number: int) -> bool:
    run = job.setup.run.train
    return job.data.eval is not None and (
        number == run.steps or _is_due(number, run.eval_every_steps)
    )


def _is_sampled(job: _Job, number: int) -> bool:
    run = job.setup.run.train
    return bool(run.sample_prompts) and (
        number == run.steps or _is_due(number, run.eval_every_steps)
    )


def _open_profiler(
    job: _Job, profile: TracedSteps | None, done: int, stack: contextlib.ExitStack
) -> Profiler:
    steps = profile.absolute(done) if profile is not None and is_main() else None
    profiler = Profiler(job.folder.path / "profile", steps)
    stack.callback(profiler.stop)
    return profiler


def _save(job: _Job, state: TrainState, eval_loss: float | None) -> None:
    with job.goodput.cause("save"):
        job.saver.save(
            int(state.step),
            params=state.params,
            optimizer=savable(state),
            extra={"data": job.batches.get_state(), "counters": dict(job.counters)},
            score=eval_loss,
        )


def _open_records(job: _Job, state: TrainState, stack: contextlib.ExitStack) -> Records | None:
    """The records to go on with; an evaluation that a signal left out is made up for."""
    done = int(state.step)

    def owed() -> dict[str, Any] | None:
        job.folder.stopped.unlink(missing_ok=True)
        if not _is_evaluated(job, done):
            return None
        entries = [e for e in read_metrics(job.folder.metrics) if e["step"] == done]
        return next((entry for entry in entries if "eval_loss" not in entry), None)

    amended = run_on_main("look for an evaluation that is owed", owed)
    if amended is not None:
        amended |= _evaluate(job, state)
    if not is_main():
        return None
    run = job.setup.run
    return stack.enter_context(Records(job.folder, run, resume_step=done, amended=amended))


class _Reporter:
    """Reads the numbers of steps, and says what is to be said of them where that is done."""

    def __init__(self, job: _Job, records: Records | None, progress: Progress | None, *, done: int):
        self._job, self._records, self._progress = job, records, progress
        self._last_step = done
        if records is not None:
            self._attempts = Attempts(job.folder.goodput, first_step=done)
        self.clock = make_clock(job.setup)
        self.stop = _Stop()

    def read(self, step: _Step) -> dict[str, Any]:
        """Waits for a step; its entry in the metrics. Notes whether to stop."""
        with self._job.goodput.cause("step"):
            entry = {"step": step.number, **_to_numbers(step.metrics)}
        entry |= self.clock.lap(entry["tokens"])
        self.clock.restart()
        problem = _count_skipped(self._job, entry)
        if problem is not None and self.stop.problem is None:
            self.stop.problem, self.stop.step, self.stop.entry = problem, step, dict(entry)
        return entry

    def step(self, step: _Step, entry: dict[str, Any]) -> None:
        self._last_step = step.number
        with self._job.goodput.cause("report"):
            if self._records is not None:
                self._records.write(entry, step.samples)
            if self._progress is not None:
                self._progress(step.number, self._job.setup.run.train.steps, entry)

    def generations(self, step: int, texts: Sequence[str] | None) -> None:
        if self._records is not None and texts is not None:
            self._records.write_generations(step, texts)

    def flush(self) -> None:
        with self._job.goodput.cause("report"):
            if self._records is not None:
                self._records.flush()

    def page(self) -> None:
        """report.html, and where the time went."""
        with self._job.goodput.cause("report"):
            if self._records is None:
                return
            goodput = self._attempts.write(self._job.goodput.summary(), self._last_step)
            self._records.summarize(goodput)
            _write_report(self._job, goodput)

    def stopped(self, saved: Path | None) -> None:
        """stopped.json, where training stops before its last step."""
        if self._records is None or not self.stop:
            return
        facts: dict[str, Any] = {"saved": str(saved)}
        if self.stop.step is not None:
            facts |= {"reason": "not finite", **_finite(self.stop.entry)}
            facts["samples"] = self.stop.step.samples
        else:
            facts["reason"] = signal.Signals(self.stop.signal).name
        _write_json(self._job.folder.stopped, facts)


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null."""
    return {name: value if math.isfinite(value) else None for name, value in entry.items()}


def _raise_stopped(stop: _Stop, saved: Path | None, *, done: bool) -> None:
    where = f"The state is saved in {saved}"
    if stop.step is not None:
        samples = stop.step.samples
        named = ", ".join(str(number) for number in samples[:_NAMED_SAMPLES])
        more = len(samples) - _NAMED_SAMPLES
        raise TrainingStoppedError(
            f"{stop.problem}; that update was left out. Its batch holds the samples {named}"
            f"{f' and {more} more' if more > 0 else ''} (all in stopped.json). {where}. Lower "
            f"optimizer.learning_rate, look at the rows of that batch, or run again to go on "
            f"behind it"
        )
    if stop.signal and not done:
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise PreemptedError(
            f"stopped by {signal.Signals(stop.signal).name}. {where}; run again to go on"
        )


def _to_numbers(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def _count_skipped(job: _Job, entry: dict[str, Any]) -> str | None:
    """Counts a step without an update; a message when training must stop."""
    if entry.pop("updated"):
        return None
    if entry["trained_tokens"] == 0:
        job.counters["batches_without_trained_tokens"] += 1
        logger.warning("step %d: no token of the batch counts; nothing was updated", entry["step"])
        return None
    job.counters["batches_not_finite"] += 1
    return (
        f"at step {entry['step']} the loss is {entry['loss']} and the gradient norm "
        f"{entry['grad_norm']}"
    )


def _evaluate(job: _Job, state: TrainState) -> dict[str, float]:
    """Over all evaluation rows: the mean of the loss, and of what else it gives."""
    assert job.data.eval is not None
    setup, totals = job.setup, dict[str, float]()
    beside = (state.step, *job.beside) if job.beside else ()
    items = setup.micro_batch_size
    share = setup.share(items * job.data.eval.rows_per_item)
    with job.goodput.cause("eval"):
        for batch in evaluation_batches(
            job.data.eval,
            batch_size=items,
            process_index=share.index,
            process_count=share.count,
        ):
            sums = setup.eval_step(state.params, setup.place(batch, share), *beside)
            for name, value in _to_numbers(sums).items():
                totals[name] = totals.get(name, 0.0) + value
    tokens, weight = totals.pop("trained_tokens"), totals.pop("weight")
    means = {name: total / weight if weight else math.nan for name, total in totals.items()}
    return {**{f"eval_{name}": mean for name, mean in means.items()}, "eval_tokens": tokens}


def _sample(job: _Job, state: TrainState) -> Sequence[str] | None:
    """What the model makes of the run's prompts; None where that cannot be told."""
    if job.sampler is None:
        logger.warning("train.sample_prompts: this caller of train() brings no sampler")
        return None
    if jax.process_count() > 1:
        logger.warning("train.sample_prompts: nothing is generated in several processes")
        return None
    with job.goodput.cause("eval"):
        setup = job.setup
        return job.sampler(setup.run, (setup.config, state.params, job.start.tokenizer), setup.mesh)


def _write_report(job: _Job, goodput: dict[str, Any]) -> None:
    sample = job.data.train.samples[0]
    data = {
        name: report.to_dict()
        for name, report in (("train", job.data.train_report), ("eval", job.data.eval_report))
        if report is not None
    }
    for name, share in job.batches.progress().items():
        data["train"][f"{name}: trained on"] = (
            f"{share['items']} rows, {share['epochs']:.2f} times all"
        )
    write_report(
        job.folder.report,
        config=job.setup.run.to_dict(),
        metrics=read_metrics(job.folder.metrics),
        data=data,
        sample=spans(sample, job.start.tokenizer),
        counters=dict(job.counters),
        parameters=job.setup.num_parameters(),
        goodput=goodput,
        machine=describe(job.setup.mesh),
        generations=read_generations(job.folder.generations),
    )


def _result(job: _Job, state: TrainState) -> Result:
    barrier("all is written")
    losses = [entry["loss"] for entry in read_metrics(job.folder.metrics)]
    finite = [loss for loss in losses if loss is not None]
    return Result(
        run_dir=job.folder.path,
        steps=int(state.step),
        final_loss=finite[-1] if finite else math.nan,
        config=job.setup.config,
        params=state.params,
        tokenizer=job.start.tokenizer,
        counters=dict(job.counters),
        goodput=job.goodput.summary(),
    )
