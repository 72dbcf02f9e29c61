"""What a run needs before its first step: its data, its mesh and its step, in shapes alone."""

from datetime import date
from typing import Any

import jax

from llama_jax import tree
from llama_jax.kernels.platforms import check_kernels
from llama_jax.mesh.distributed import all_or_none, run_on_main
from train.agreement import check_agreement
from train.config import RunConfig
from train.data.build import RunData, build_data
from train.data.row_set import read_run_rows
from train.distill_teacher import read_teacher
from train.setup import Setup, make_setup, open_mesh
from train.start import Start, read_start


def build(run: RunConfig) -> tuple[Start, Setup, RunData]:
    """From what costs least to what costs most, so that mistakes come out early; what one of
    several processes cannot do, none does."""
    # Processes may begin beside midnight. Asked for first: what follows may fail in one alone.
    today = run_on_main("note the day", lambda: date.today().isoformat())
    with all_or_none("build"):
        _check_cache(run)
        rows, held_out = read_run_rows(run)
        start = read_start(run)
        run = _dated(run, start.tokenizer, today)
        teacher = read_teacher(run, start.tokenizer)
        data = build_data(run, rows, held_out, start.tokenizer)
        mesh = open_mesh(run.mesh)
        check_kernels(run.compute, start.config, mesh.devices.flat[0].platform)
        setup = make_setup(run, start.config, start.params, mesh, teacher=teacher)
    check_agreement(run, data)
    return start, setup, data


def _check_cache(run: RunConfig) -> None:
    """Raises ValueError for a cache that this training never fills; `fit` reads it in any case."""
    generates = run.train.sample_prompts or (run.distill is not None and run.distill.on_policy)
    if run.compute.cache_dtype is not None and not generates:
        raise ValueError(
            f"compute.cache_dtype is {run.compute.cache_dtype}, but this run generates no text; "
            f"set train.sample_prompts, or leave it out"
        )


def _dated(run: RunConfig, tokenizer: Any, today: str) -> RunConfig:
    """The config with the day that templates are told."""
    if run.data.template_date is not None or not tokenizer.tells_the_day:
        return run
    return run.replace(data=run.data.replace(template_date=today))


def lower(setup: Setup) -> Any:
    """The step, to be compiled for the mesh that is set."""
    batch = setup.batch_struct(setup.run.train.batch_size)
    return setup.step.lower(setup.abstract, batch, *setup.beside)


def dry_run(run: RunConfig) -> dict[str, Any]:
    """Builds everything on shapes, reads the data and lowers the step; nothing is trained, no
    weight is read and no folder written. Returns the counts a user would ask for."""
    _, setup, data = build(run)
    with jax.set_mesh(setup.mesh):
        lowered = lower(setup)
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
