"""The training loop: build, go on from the last checkpoint, step, measure, evaluate, save.

The numbers of a step are read while the next one runs, so that the devices never wait for them. A
loss that is not finite is therefore noticed one step later, which costs nothing: the step itself
leaves such an update out.
"""

import contextlib
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats.checkpoint_saver import Saver
from llama_jax.mesh.distributed import all_or_none, barrier, is_main, run_on_main
from train.build import build, lower
from train.config import RunConfig
from train.data.build import RunData
from train.data.report import colored
from train.distill_cache import attach_teacher, needs_cache
from train.distill_teacher import load_teacher, read_teacher
from train.evaluation import evaluate, sample_prompts
from train.generations import Sampler
from train.goodput import Goodput
from train.interrupt import StopRequest, make_vote, stop_on_signals
from train.job import Job, RunningStep
from train.lock import locked
from train.metrics import Progress, read_metrics
from train.profiler import Profiler, TracedSteps
from train.records import Records
from train.reference import attach_reference, needs_reference
from train.reporter import Reporter
from train.resume import first_state, savable
from train.run_dir import open_run_dir, write_config
from train.state import TrainState
from train.weights_and_biases import check_installed

logger = logging.getLogger(__name__)


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
    with all_or_none("open the run folder"):
        check_installed(run.wandb)
        folder, run = open_run_dir(run)
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(stop_on_signals(run.train.grace_seconds))
        start, setup, data = build(run)
        run = setup.run
        _show_data(data, start.tokenizer)
        # Until the very end: nobody else may write into the folder before all is said.
        run_on_main("lock", lambda: stack.enter_context(locked(folder.path)))
        share = setup.share(run.train.batch_size * data.train.rows_per_item)
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
        job = Job(start, setup, data, batches, folder, share, saver, goodput, sampler)
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


def _show_data(data: RunData, tokenizer: Any) -> None:
    for name, report in (("train", data.train_report), ("evaluation", data.eval_report)):
        for line in report.lines(name) if report is not None else ():
            logger.info("%s", line)
    sample = data.train.samples[0]
    text = colored(sample, tokenizer, ansi=sys.stderr.isatty())
    logger.info("a sample, trained tokens marked:\n%s", text)


# Steps


def _steps(
    job: Job,
    state: TrainState,
    request: StopRequest,
    progress: Progress | None,
    stop_after: int | None,
    profile: TracedSteps | None,
) -> TrainState:
    run, setup, goodput = job.setup.run.train, job.setup, job.goodput
    first = number = int(state.step)
    with contextlib.ExitStack() as stack:
        report = Reporter(job, _open_records(job, state, stack), progress, done=first)
        if first >= run.steps:
            logger.info("all %d steps are done already", run.steps)
            report.page()
            return state
        logger.info("compiling the step")
        with goodput.cause("compile"):
            step, vote = lower(setup).compile(), make_vote(setup.mesh)
        request.begin()
        running: RunningStep | None = None
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
            before, running = running, RunningStep(number, metrics, job.batches.samples)
            if before is not None:
                report.step(before, report.read(before))
            stop.signal = ballot()
            evaluating, sampling = job.is_evaluated(number), job.is_sampled(number)
            saving = job.is_saved(number) or number == stop_after
            if not (evaluating or sampling or saving or stop):
                continue
            entry = report.read(running)
            # A machine about to go leaves no time; the resumed run makes up for it.
            if evaluating and not stop.signal:
                entry |= evaluate(job, state)
            if sampling and not stop.signal:
                report.generations(number, sample_prompts(job, state))
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
    stop.raise_error(saved, done=number == run.steps)
    return state


def _open_profiler(
    job: Job, profile: TracedSteps | None, done: int, stack: contextlib.ExitStack
) -> Profiler:
    steps = profile.absolute(done) if profile is not None and is_main() else None
    last = job.setup.run.train.steps
    if steps is not None and not done < steps.first <= last:
        logger.warning(
            "--profile: step %d, with which the trace would begin, is not among the steps %d to %d "
            "of this start; nothing is traced",
            steps.first,
            done + 1,
            last,
        )
    profiler = Profiler(job.folder.path / "profile", steps)
    stack.callback(profiler.stop)
    return profiler


def _save(job: Job, state: TrainState, eval_loss: float | None) -> None:
    with job.goodput.cause("save"):
        job.saver.save(
            int(state.step),
            params=state.params,
            optimizer=savable(state),
            extra={"data": job.batches.get_state(), "counters": dict(job.counters)},
            score=eval_loss,
        )


def _open_records(job: Job, state: TrainState, stack: contextlib.ExitStack) -> Records | None:
    """The records to go on with; an evaluation that a signal left out is made up for."""
    done = int(state.step)

    def owed() -> dict[str, Any] | None:
        job.folder.stopped.unlink(missing_ok=True)
        if not job.is_evaluated(done):
            return None
        entries = [e for e in read_metrics(job.folder.metrics) if e["step"] == done]
        return next((entry for entry in entries if "eval_loss" not in entry), None)

    amended = run_on_main("look for an evaluation that is owed", owed)
    if amended is not None:
        amended |= evaluate(job, state)
    if not is_main():
        return None
    run = job.setup.run
    return stack.enter_context(Records(job.folder, run, resume_step=done, amended=amended))


def _result(job: Job, state: TrainState) -> Result:
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
