"""The training loop: build, go on from the last checkpoint, step, measure, evaluate, save."""

import logging
import math
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats import checkpoint
from train.config import RunConfig
from train.data.build import RunData, build_data
from train.data.pipeline import TrainingBatches, evaluation_batches
from train.data.report import colored, spans
from train.data.row_set import read_run_rows
from train.interrupt import stop_on_signals
from train.metrics import Clock, MetricsWriter, Progress, progress_note, read_metrics
from train.report import write_report
from train.run_dir import RunDir, open_run_dir, write_config
from train.setup import Setup, init_random, make_setup, make_state, open_mesh
from train.start import Start, load_weights, read_start
from train.state import TrainState

logger = logging.getLogger(__name__)


class TrainingStoppedError(RuntimeError):
    """Training ended before its last step; what was learned is saved."""


@dataclass(frozen=True)
class Result:
    """steps: the last step done. final_loss: of the last step with trained tokens, NaN if there
    was none. counters: what was skipped, by reason. params are as trained, adapters apart."""

    run_dir: Path
    steps: int
    final_loss: float
    config: ModelConfig
    params: tree.Tree
    tokenizer: Any
    counters: dict[str, int]


@dataclass
class _Job:
    """What the parts of the loop share while it runs."""

    start: Start
    setup: Setup
    data: RunData
    batches: TrainingBatches
    folder: RunDir
    counters: Counter[str]
    last_checkpoint: Path | None = None


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
        "state_bytes": tree.num_bytes([setup.abstract.params, setup.abstract.opt_state]),
        "data": data.train_report.to_dict(),
        "hlo_lines": lowered.as_text().count("\n"),
    }


def train(
    run: RunConfig, *, progress: Progress | None = None, stop_after: int | None = None
) -> Result:
    """Trains as the config says and returns the result; its folder is `run.output`.

    A folder that holds this very run is resumed from its latest checkpoint, with the result of an
    uninterrupted run. stop_after: save and stop when this many steps are done, as a signal would.

    Raises ValueError for a config, data or folder that does not fit, TrainingStoppedError when the
    loss is not finite or a signal came.
    """
    folder = open_run_dir(run)
    start, setup, data = _build(run)
    _show_data(data, start.tokenizer)
    job = _Job(start, setup, data, data.batches(run), folder, Counter())
    with jax.set_mesh(setup.mesh):
        state = _first_state(job)
        write_config(folder, run)
        state = _steps(job, state, progress, stop_after)
    return _result(job, state)


def _build(run: RunConfig) -> tuple[Start, Setup, RunData]:
    """From what costs least to what costs most, so that mistakes come out early."""
    rows, held_out = read_run_rows(run)
    start = read_start(run)
    data = build_data(run, rows, held_out, start.tokenizer)
    return start, make_setup(run, start.config, start.params, open_mesh(run.mesh)), data


def _lower(setup: Setup) -> Any:
    return setup.step.lower(setup.abstract, setup.batch_struct(setup.run.train.batch_size))


def _show_data(data: RunData, tokenizer: Any) -> None:
    for name, report in (("train", data.train_report), ("evaluation", data.eval_report)):
        for line in report.lines(name) if report is not None else ():
            logger.info("%s", line)
    sample = data.train.samples[0]
    text = colored(sample, tokenizer, ansi=sys.stderr.isatty())
    logger.info("a sample, trained tokens marked:\n%s", text)


# Start and resume


def _first_state(job: _Job) -> TrainState:
    """The state to go on from: the latest checkpoint's, or that before the first step."""
    root = job.folder.checkpoints
    checkpoint.remove_unfinished(root)
    while (step := checkpoint.latest_step(root)) is not None:
        try:
            return _resume(job, checkpoint.step_folder(root, step))
        except checkpoint.DamagedCheckpointError as error:
            if not job.setup.run.train.resume_older:
                raise checkpoint.DamagedCheckpointError(
                    f"{error}. To go on from an older checkpoint set train.resume_older=true; the "
                    f"damaged one is kept under another name"
                ) from error
            aside = checkpoint.set_aside(root, step)
            logger.warning("%s; renamed to %s, trying an older one", error, aside.name)
    setup = job.setup
    if setup.run.model.init == "random":
        return make_state(setup, init_random(setup))
    base = load_weights(setup.run, job.start, mesh=setup.mesh, rules=setup.compute.rules)
    return make_state(setup, base)


def _resume(job: _Job, folder: Path) -> TrainState:
    abstract = job.setup.abstract
    params, saved, extra = checkpoint.restore_train_state(
        folder, params=abstract.params, optimizer=_savable(abstract)
    )
    job.batches.set_state(extra["data"])
    job.counters.update(extra["counters"])
    job.last_checkpoint = folder
    logger.info("resuming from step %d in %s", extra["step"], folder)
    key = jax.random.wrap_key_data(saved["rng"])
    return TrainState(saved["step"], params, saved["opt_state"], key)


def _savable(state: TrainState) -> dict[str, Any]:
    """The state (or its shape structs) without its parameters, as arrays of numbers."""
    rng: Any = state.rng
    if isinstance(rng, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, rng)
        rng = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=rng.sharding)
    else:
        rng = jax.random.key_data(rng)
    return {"step": state.step, "opt_state": state.opt_state, "rng": rng}


def _save(job: _Job, state: TrainState) -> None:
    run = job.setup.run
    job.last_checkpoint = checkpoint.save_train_state(
        job.folder.checkpoints,
        int(state.step),
        config=job.setup.config,
        params=state.params,
        mask=job.setup.mask,
        optimizer=_savable(state),
        extra={"data": job.batches.get_state(), "counters": dict(job.counters)},
        tokenizer=job.start.tokenizer,
        keep=run.train.keep_checkpoints,
        frozen_from=job.last_checkpoint,
    )


# Steps


def _steps(
    job: _Job, state: TrainState, progress: Progress | None, stop_after: int | None
) -> TrainState:
    run, setup = job.setup.run.train, job.setup
    first = int(state.step)
    if first >= run.steps:
        logger.info("all %d steps are done already", run.steps)
        return state
    logger.info("compiling the step")
    step = _lower(setup).compile()
    problem = None
    with MetricsWriter(job.folder.path, resume_step=first) as writer, stop_on_signals() as request:
        clock = Clock()
        for number in range(first + 1, run.steps + 1):
            state, metrics = step(state, setup.place(next(job.batches)))
            entry = {"step": number, **_to_numbers(metrics)}
            entry |= clock.lap(entry["tokens"])
            problem = _count_skipped(job, entry)
            is_last = number == run.steps
            stopping = is_last or number == stop_after or bool(problem) or bool(request.came)
            if job.data.eval is not None and (is_last or _is_due(number, run.eval_every_steps)):
                entry |= _evaluate(job, state)
            writer.write(entry)
            if progress is not None:
                progress(number, run.steps, progress_note(entry))
            if stopping or _is_due(number, run.checkpoint_every_steps):
                _save(job, state)
                _write_report(job)
            if stopping:
                break
            clock.restart()
    _raise_stopped(job, problem, request.came, done=number == run.steps)
    return state


def _is_due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _raise_stopped(
    job: _Job, problem: str | None, came: signal.Signals | None, *, done: bool
) -> None:
    where = f"The state is saved in {job.last_checkpoint}"
    if problem is not None:
        raise TrainingStoppedError(
            f"{problem}; that update was left out. {where}. Lower optimizer.learning_rate, look at "
            f"the rows of that batch, or run again to go on behind it"
        )
    if came is not None and not done:
        if came == signal.SIGINT:
            raise KeyboardInterrupt
        raise TrainingStoppedError(f"stopped by {came.name}. {where}; run again to go on")


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
    """Token mean of the loss over all evaluation rows."""
    assert job.data.eval is not None
    total = weight = 0.0
    for batch in evaluation_batches(job.data.eval, batch_size=job.setup.micro_batch_size):
        sums = _to_numbers(job.setup.eval_step(state.params, job.setup.place(batch)))
        total += sums["loss"]
        weight += sums["trained_tokens"]
    return {"eval_loss": total / weight, "eval_tokens": weight}


def _write_report(job: _Job) -> None:
    sample = job.data.train.samples[0]
    write_report(
        job.folder.report,
        config=job.setup.run.to_dict(),
        metrics=read_metrics(job.folder.metrics),
        data={
            name: report.to_dict()
            for name, report in (("train", job.data.train_report), ("eval", job.data.eval_report))
            if report is not None
        },
        sample=spans(sample, job.start.tokenizer),
        counters=dict(job.counters),
        parameters=job.setup.num_parameters(),
    )


def _result(job: _Job, state: TrainState) -> Result:
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
    )
