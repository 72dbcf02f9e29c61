"""What of a run config does not fit together, whatever its method; `methods.py` knows the rest."""

import json
import math
from typing import TYPE_CHECKING

from llama_jax.config import Compute

if TYPE_CHECKING:
    from train.config import RunConfig


def check_run(run: "RunConfig") -> None:
    """Raises ValueError, naming the fields, where sections contradict each other."""
    _check_schedule(run)
    _check_zeros(run)
    _check_evaluation(run)
    _check_best(run)
    _check_rounding(run)
    _check_gradient_dtype(run)
    _check_chunks(run)


def _check_schedule(run: "RunConfig") -> None:
    schedule = run.schedule
    needed = schedule.warmup_steps + (schedule.decay_steps or 0)
    if needed > run.train.steps:
        raise ValueError(
            f"schedule.warmup_steps {schedule.warmup_steps} and decay_steps "
            f"{schedule.decay_steps or 0} take {needed} updates, but train.steps is "
            f"{run.train.steps}; shorten them or train longer"
        )
    if schedule.final_ratio and schedule.decay_steps is None and needed == run.train.steps:
        raise ValueError(
            f"schedule.final_ratio is {schedule.final_ratio}, but schedule.warmup_steps "
            f"{schedule.warmup_steps} takes all updates, so that none is left for the fall; "
            f"shorten it, or leave final_ratio out"
        )


def _check_zeros(run: "RunConfig") -> None:
    if run.model.keep_zeros and run.lora is not None:
        raise ValueError(
            "model.keep_zeros is true, but adapters are added to the weights, whose zeros a "
            "merge would fill; train without section lora, or set keep_zeros to false"
        )


def _check_evaluation(run: "RunConfig") -> None:
    evaluates = run.data.is_evaluated or run.train.sample_prompts
    if run.train.eval_every_steps is not None and not evaluates:
        raise ValueError(
            "train.eval_every_steps is set, but there is nothing to evaluate on; set data.eval "
            "or data.eval_fraction, or train.sample_prompts"
        )


def _check_best(run: "RunConfig") -> None:
    """Of checkpoints before the last, some must be evaluated for the best to be told."""
    train = run.train
    if not train.keep_best:
        return
    if not run.data.is_evaluated:
        raise ValueError(
            "train.keep_best is set, but there is nothing to evaluate on; set data.eval or "
            "data.eval_fraction"
        )
    evaluated, saved = train.eval_every_steps, train.checkpoint_every_steps
    if evaluated is None or saved is None or math.lcm(evaluated, saved) >= train.steps:
        raise ValueError(
            f"train.keep_best is {train.keep_best}, but no checkpoint before the last step is "
            f"evaluated: train.eval_every_steps is {json.dumps(evaluated)}, "
            f"train.checkpoint_every_steps {json.dumps(saved)}, train.steps {train.steps}. Set "
            f"the first two to one number below train.steps, or keep_best to 0"
        )


def _check_rounding(run: "RunConfig") -> None:
    if run.optimizer.stochastic_rounding and run.compute.param_dtype != "bfloat16":
        raise ValueError(
            f"optimizer.stochastic_rounding is true, but compute.param_dtype is "
            f"{run.compute.param_dtype or 'that of the weights'}: only bfloat16 weights are "
            f"rounded so; set it to bfloat16, or leave the rounding out"
        )


def _check_gradient_dtype(run: "RunConfig") -> None:
    compute = run.compute
    if compute.gradient_dtype == "float32":
        return
    if (compute.dtype, compute.param_dtype) != ("bfloat16", "float32"):
        raise ValueError(
            f"compute.gradient_dtype is {compute.gradient_dtype}, which is for float32 weights "
            f"multiplied in bfloat16, but compute.param_dtype is "
            f"{compute.param_dtype or 'that of the weights'} and compute.dtype "
            f"{compute.dtype}; set them so, or leave it out"
        )
    if run.lora is not None or run.qat is not None:
        section = "lora" if run.lora is not None else "qat"
        raise ValueError(
            f"compute.gradient_dtype is {compute.gradient_dtype}, but with a section {section} "
            f"no plain matrix is trained; leave it out"
        )


def _check_chunks(run: "RunConfig") -> None:
    compute = run.compute
    if compute.moe_chunk_tokens != Compute.moe_chunk_tokens and not compute.cuts_experts:
        raise ValueError(
            f"compute.moe_chunk_tokens is {compute.moe_chunk_tokens}, but tokens go through "
            f"experts in chunks only when compute.remat is full or offload and compute.moe is "
            f"grouped or megablox; here they are {compute.remat} and {compute.moe}. Change them, "
            f"or leave it out"
        )
