"""What is asked of the model between steps: its loss over the evaluation rows, and continuations of
the run's prompts."""

import logging
import math
from collections.abc import Sequence

import jax

from train.data.pipeline import evaluation_batches
from train.job import Job, to_numbers
from train.state import TrainState

logger = logging.getLogger(__name__)


def evaluate(job: Job, state: TrainState) -> dict[str, float]:
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
            for name, value in to_numbers(sums).items():
                totals[name] = totals.get(name, 0.0) + value
    tokens, weight = totals.pop("trained_tokens"), totals.pop("weight")
    means = {name: total / weight if weight else math.nan for name, total in totals.items()}
    return {**{f"eval_{name}": mean for name, mean in means.items()}, "eval_tokens": tokens}


def sample_prompts(job: Job, state: TrainState) -> Sequence[str] | None:
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
