"""The state that a run begins or goes on with."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from llama_jax.formats import checkpoint
from train.data.pipeline import TrainingBatches
from train.setup import Setup, init_random, make_state, quantization
from train.start import Start, load_weights
from train.state import TrainState

logger = logging.getLogger(__name__)


def first_state(
    root: Path, setup: Setup, start: Start, batches: TrainingBatches, counters: Counter[str]
) -> TrainState:
    """The state of the latest checkpoint under `root`, or that before the first step. Batches and
    counters are put where they were then.

    Raises CheckpointError when there is a checkpoint that cannot be gone on from.
    """
    older = setup.run.train.resume_older
    try:
        found = checkpoint.find_newest(root, allow_older=older)
    except checkpoint.DamagedCheckpointError as error:
        if older:
            raise
        raise checkpoint.DamagedCheckpointError(
            f"{error}. To go on from an older checkpoint set train.resume_older=true; the "
            f"damaged one is kept under another name"
        ) from error
    if found is not None:
        folder, manifest = found
        return _resumed(folder, manifest, setup, batches, counters)
    if setup.run.model.init == "random":
        return make_state(setup, init_random(setup))
    base = load_weights(
        setup.run,
        start,
        mesh=setup.mesh,
        rules=setup.compute.rules,
        quantization=quantization(setup.run),
    )
    return make_state(setup, base)


def _resumed(
    folder: Path,
    manifest: dict[str, Any],
    setup: Setup,
    batches: TrainingBatches,
    counters: Counter[str],
) -> TrainState:
    params, saved, extra = checkpoint.restore_train_state(
        folder,
        params=setup.abstract.params,
        optimizer=savable(setup.abstract),
        manifest=manifest,
    )
    batches.set_state(extra["data"])
    counters.update(extra["counters"])
    logger.info("resuming from step %d in %s", extra["step"], folder)
    key = jax.random.wrap_key_data(saved["rng"])
    return TrainState(saved["step"], params, saved["opt_state"], key, saved["auxiliary"])


def savable(state: TrainState) -> dict[str, Any]:
    """The state (or its shape structs) without its parameters, as arrays of numbers."""
    rng: Any = state.rng
    if isinstance(rng, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, rng)
        rng = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=rng.sharding)
    else:
        rng = jax.random.key_data(rng)
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "rng": rng,
        "auxiliary": state.auxiliary,
    }
