"""What the reference model thinks of the rows of a DPO run, computed once and kept with the run."""

import dataclasses
import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import tree
from llama_jax.mesh.distributed import run_on_main
from llama_jax.mesh.sharding import batch_sharding, replicated
from llama_jax.model.log_probs import sequence_log_probs
from llama_jax.model.losses import Batch
from train.data.build import RunData
from train.data.pipeline import RowPlan, evaluation_batches
from train.setup import Setup
from train.state import TrainState

logger = logging.getLogger(__name__)

FILE = "reference.npz"


_ADVICE = "bring the file back, or start a new run in another output folder"


def needs_reference(setup: Setup) -> bool:
    return setup.run.dpo is not None and setup.run.dpo.reference == "cached"


def attach_reference(setup: Setup, data: RunData, folder: Path, state: TrainState) -> RunData:
    """The data with the reference's log-probabilities, which batches then carry.

    They are read from the run folder, or computed with the parameters of `state` before its first
    step and written there by process 0. Must run in all processes, with the mesh in force.

    Raises ValueError when the stored ones are of other data or another model, or are missing after
    the first step, when the reference is gone.
    """
    path, wanted = folder / FILE, fingerprint(setup, data)
    plans = {"train": data.train} if data.eval is None else {"train": data.train, "eval": data.eval}
    # One process decides: all must take the same way.
    if run_on_main("look for the reference", path.is_file):
        stored = _read(path, wanted, plans)
    elif int(state.step):
        raise ValueError(
            f"{path} is missing: it holds the log-probabilities of the reference, which is the "
            f"model before the first step. Bring the file back, or start a new run"
        )
    else:
        logger.info("computing the reference's log-probabilities")
        stored = {
            name: reference_log_probs(setup, plan, state.params) for name, plan in plans.items()
        }
        run_on_main("write the reference", lambda: _write(path, wanted, stored))
    return dataclasses.replace(
        data,
        train=dataclasses.replace(data.train, reference=stored["train"]),
        eval=None
        if data.eval is None
        else dataclasses.replace(data.eval, reference=stored["eval"]),
    )


def reference_log_probs(setup: Setup, plan: RowPlan, params: tree.Tree) -> np.ndarray:
    """[samples] float32: of each sample the log-probability of its trained tokens."""
    compute, config = setup.compute, setup.config

    def of_rows(params: tree.Tree, batch: Batch) -> jax.Array:
        return sequence_log_probs(config, params, batch, compute=compute)[0]

    places = jax.tree.map(lambda struct: struct.sharding, setup.abstract.params)
    rows = batch_sharding(setup.mesh, compute.rules)
    of_rows = jax.jit(of_rows, in_shardings=(places, rows), out_shardings=replicated(setup.mesh))
    share = setup.share(setup.micro_batch_size * setup.rows_per_item)
    found = [
        np.asarray(of_rows(params, setup.place(batch, share)))
        for batch in evaluation_batches(
            plan,
            batch_size=setup.micro_batch_size,
            process_index=share.index,
            process_count=share.count,
        )
    ]
    # Every row holds one sample, in order; what follows the last is padding.
    return np.concatenate(found)[: len(plan.samples)]


def fingerprint(setup: Setup, data: RunData) -> str:
    """Of the rows and of the model that judges them."""
    run = setup.run.to_dict()
    what = {
        "rows": [plan.fingerprint for plan in (data.train, data.eval) if plan is not None],
        "model": run["model"],
        "seed": run["train"]["seed"],  # of random weights
        "quantization": run["quantization"],
        "dtype": run["compute"]["dtype"],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _read(path: Path, wanted: str, plans: dict[str, RowPlan]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            stored: dict[str, Any] = dict(file)
    except (EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); {_ADVICE}") from error
    if str(stored.pop("fingerprint", None)) != wanted:
        raise ValueError(
            f"{path} holds log-probabilities of other rows or of another model than this run's; "
            f"bring back what the run began with, or start a new run in another output folder"
        )
    sizes = {name: (len(plan.samples),) for name, plan in plans.items()}
    if {name: array.shape for name, array in stored.items()} != sizes:
        raise ValueError(f"{path} does not hold a number for each sample; {_ADVICE}")
    return stored


def _write(path: Path, wanted: str, stored: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, fingerprint=np.str_(wanted), **stored)
    temporary.replace(path)
