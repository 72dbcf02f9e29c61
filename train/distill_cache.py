"""A teacher's outputs for the rows of a run, computed once and kept in the run folder.

Of each position the k likeliest tokens and the probability of all others together: the teacher need
not run, nor be in memory, while the student is trained.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.formats.json_fields import read_json
from llama_jax.mesh.distributed import run_on_main
from llama_jax.mesh.sharding import loss_rules, replicated
from llama_jax.model import transformer
from llama_jax.model.divergence import top_log_probs
from llama_jax.model.losses import Batch, dealt_head, in_chunks
from llama_jax.weights.dot import dot
from train.data.build import RunData
from train.data.pipeline import RowPlan, evaluation_batches
from train.data.taught import Taught
from train.distill import Teacher
from train.distill_teacher import teacher_params
from train.setup import Setup

logger = logging.getLogger(__name__)

FOLDER = "teacher"
_NOTE = "teacher.json"


def needs_cache(setup: Setup) -> bool:
    return setup.run.distill is not None and setup.run.distill.top_k is not None


def attach_teacher(setup: Setup, data: RunData, teacher: Teacher, folder: Path) -> RunData:
    """The data with the teacher's outputs, which batches then carry; computed where the run folder
    has none. Must run in all processes, with the mesh in force.

    Raises ValueError when the stored ones are of other rows or of another teacher.
    """
    path, wanted = folder / FOLDER, _fingerprint(setup, data)
    plans = {"train": data.train, "eval": data.eval}
    if run_on_main("look for the teacher's outputs", path.is_dir):
        if _read_note(path / _NOTE) != wanted:
            raise ValueError(
                f"{path} holds a teacher's outputs for other rows or settings, or another "
                f"teacher's; remove it to have them computed anew, or start a new run"
            )
    else:
        logger.info("computing the teacher's outputs")
        params = teacher_params(setup, teacher)
        temporary = folder / f".{FOLDER}.tmp"

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def finish() -> None:
            (temporary / _NOTE).write_text(json.dumps(wanted), encoding="utf-8")
            temporary.rename(path)

        run_on_main("begin the teacher's outputs", begin)
        for name, plan in plans.items():
            if plan is not None:
                _write(setup, plan, teacher, params, temporary / name)
        run_on_main("keep the teacher's outputs", finish)
    found = {
        name: None
        if plan is None
        else dataclasses.replace(plan, taught=_read(path / name, plan, wanted["top_k"]))
        for name, plan in plans.items()
    }
    assert found["train"] is not None
    return dataclasses.replace(data, train=found["train"], eval=found["eval"])


def _fingerprint(setup: Setup, data: RunData) -> dict[str, Any]:
    section = setup.run.distill
    assert section is not None
    rows = [plan.fingerprint for plan in (data.train, data.eval) if plan is not None]
    return {
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "teacher": [section.teacher, section.teacher_dtype, setup.compute.dtype],
        "top_k": section.top_k,
        "temperature": section.temperature,
    }


def _read_note(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}; {_advice(path)}") from error


def _read(path: Path, plan: RowPlan, k: int) -> Taught:
    places = (len(plan.groups), plan.sequence_length)
    return Taught(
        _read_array(Path(f"{path}.ids.npy"), (*places, k)),
        _read_array(Path(f"{path}.log_probs.npy"), (*places, k + 1)),
    )


def _read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {_advice(path)}") from error
    if found.shape != shape:
        raise ValueError(f"{path} holds {found.shape} values, not {shape}; {_advice(path)}")
    return found


def _advice(path: Path) -> str:
    return f"remove {path.parent} to have the teacher's outputs computed anew"


def _write(setup: Setup, plan: RowPlan, teacher: Teacher, params: tree.Tree, path: Path) -> None:
    section, mesh = setup.run.distill, setup.mesh
    assert section is not None and section.top_k is not None
    rows, length, k = len(plan.groups), plan.sequence_length, section.top_k
    files: list[Any] = []

    def open_files() -> None:
        for name, width, kind in (("ids", k, np.int32), ("log_probs", k + 1, np.float32)):
            files.append(
                np.lib.format.open_memmap(
                    f"{path}.{name}.npy", mode="w+", dtype=kind, shape=(rows, length, width)
                )
            )

    run_on_main("open the teacher's outputs", open_files)
    run = jax.jit(
        lambda params, batch: _outputs(setup, teacher, params, batch),
        out_shardings=replicated(mesh),
    )
    share = setup.share(setup.micro_batch_size)
    done = 0
    for batch in evaluation_batches(
        plan,
        batch_size=setup.micro_batch_size,
        process_index=share.index,
        process_count=share.count,
    ):
        found = jax.device_get(run(params, setup.place(batch, share)))
        size = min(setup.micro_batch_size, rows - done)
        for file, values in zip(files, found, strict=False):
            file[done : done + size] = values[:size]
        done += size
    for file in files:
        file.flush()


def _outputs(
    setup: Setup, teacher: Teacher, params: tree.Tree, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """(ids [B, T, k], log-probabilities [B, T, k + 1]) of a batch, chunk by chunk."""
    section, compute = setup.run.distill, setup.compute
    assert section is not None and section.top_k is not None
    k, temperature = section.top_k, section.temperature
    assert isinstance(temperature, float), "the config lets no schedule through"
    hidden, _, _ = transformer.hidden_states(
        teacher.config,
        params,
        batch.tokens,
        compute=compute,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )
    head = transformer.head_weight(teacher.config, params)
    head = dealt_head(head, loss_rules(head.shape[0], compute.rules))

    def of_chunk(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = dot(hidden, head, compute=compute, keep_accumulator=True).astype(jnp.float32)
        return top_log_probs(
            logits,
            num_ids=teacher.num_ids,
            k=k,
            temperature=temperature,
        )

    (chunks,) = in_chunks(compute, hidden)
    found = jax.lax.map(of_chunk, chunks)
    length = batch.tokens.shape[1]

    def joined(values: jax.Array) -> jax.Array:
        merged = values.swapaxes(0, 1).reshape(values.shape[1], -1, values.shape[-1])
        return merged[:, :length]

    return joined(found[0]), joined(found[1])
