"""The training step: one pure function, made once from a loss, that knows no files or clocks."""

from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import constrain
from llama_jax.model.losses import Batch, next_token_loss
from llama_jax.model.moe import balancing_loss
from llama_jax.weights.lora import with_dropout
from llama_jax.weights.table import weight_table
from llama_jax.weights.tensors import TappedTensor
from train.auxiliary import filled, joined, parted
from train.optim import Optimizer
from train.state import Offload, TrainState

Metrics = dict[str, jax.Array]
Step = Callable[..., tuple[TrainState, Metrics]]


class LossSums(NamedTuple):
    """What a loss gives: sums over a batch, so that micro-batches and devices add up.

    loss: to be divided by weight, the number of tokens (or pairs) that count; stats: the router's
    sums, None without experts; means: more sums to be divided by weight, by name.
    """

    loss: jax.Array
    weight: jax.Array
    stats: Any
    means: Mapping[str, jax.Array] = MappingProxyType({})


# prepare(config, params, batch, key, *, first_row, compute) -> Batch
Prepare = Callable[..., Batch]
# loss(config, params, batch, *, compute) -> LossSums, or a tuple of its first three.
Loss = Callable[..., tuple[Any, ...]]

_EMBEDDING, _HEAD = "embed_tokens", "lm_head"
_DROPOUT = 0x64726F70  # folded into a run's key for it: no count of steps comes so far


def make_train_step(
    config: ModelConfig,
    compute: Compute,
    *,
    optimizer: Optimizer,
    mask: tree.Tree,
    loss: Loss = next_token_loss,
    accumulation_steps: int = 1,
    rows_per_item: int = 1,
    axis: str | None = None,
    held: tree.Tree | None = None,
    prepare: Prepare | None = None,
    offload: Offload | None = None,
    lora_dropout: float = 0.0,
) -> Step:
    """`step(state, batch, *beside) -> (state, metrics)` over arrays [B, T].

    What stands beside the state, such as a teacher, goes to the loss, which then is also told the
    number of the step: `loss(config, params, batch, *beside, step=…, compute=…)`. Weights that are
    trained beside the model, if the state has any, it gets as `auxiliary=…`.

    axis: of `jax.pmap`, when each device has a part of the batch's rows.

    prepare: changes the batch before it is taken apart, with a key of the step.

    held: true for the arrays whose zeros, left by pruning, stay exactly zero: they get no gradient,
    so that neither the norm nor a moment knows them, and no update. None: no array's.

    offload: None where moments stay on the devices.

    lora_dropout: with what probability numbers that go into adapters are dropped, anew in each step
    and each of its parts.

    Only what `mask` selects is differentiated. With `accumulation_steps` the batch is taken in that
    many parts, whose sums of loss and gradient are added before the one division by the number of
    counted tokens: the result is that of the whole batch at once. Rows that belong together
    (`rows_per_item` in succession) stay so.

    The update is left out, and parameters, moments and update count stay as they are, when no token
    counts or when the loss or its gradient is not finite.

    Metrics: loss (mean over what counts, tokens or pairs; NaN when nothing does) and the loss's
    other means, aux_loss (with experts), grad_norm (trained arrays, before clipping),
    learning_rate, trained_tokens, tokens (padding left out), updated (0 or 1).
    """

    def step(state: TrainState, batch: Batch, *beside: Any) -> tuple[TrainState, Metrics]:
        if prepare is not None:
            rows = batch.tokens.shape[0]
            first = 0 if axis is None else jax.lax.axis_index(axis) * rows
            key = jax.random.fold_in(state.rng, state.step)
            batch = prepare(config, state.params, batch, key, first_row=first, compute=compute)
        # The sharded step sums a tied matrix's two gradients over devices before it adds them.
        is_parted = axis is not None and config.tie_word_embeddings
        taken = config.replace(tie_word_embeddings=False) if is_parted else config
        narrowed = _narrowed_matrices(config) if compute.gradient_dtype == "bfloat16" else set()
        gradient = _make_gradient(
            taken, compute, _bound(loss, state.step, beside), narrowed, (lora_dropout, axis)
        )
        trained, frozen = tree.partition(state.params, mask)
        trained = joined(trained, state.auxiliary)
        frozen = filled(frozen, state.auxiliary, None)
        given = [_with_head(each) if is_parted else each for each in (trained, frozen)]
        sums, gradients = _accumulate(
            lambda part, key: gradient(*given, part, key),
            batch,
            jax.random.fold_in(jax.random.fold_in(state.rng, _DROPOUT), state.step),
            (accumulation_steps, rows_per_item),
            compute,
        )
        sums, gradients = _over_devices((sums, gradients), axis)
        if is_parted:
            gradients = _without_head(gradients)
        weight = jnp.maximum(sums["weight"], 1.0)
        gradients = jax.tree.map(lambda g: g / weight.astype(g.dtype), gradients)
        kept = None
        if held is not None:
            kept = filled(tree.partition(held, mask)[0], state.auxiliary, False)
        gradients = _with_zeros(gradients, trained, kept)
        moments = state.opt_state
        if offload is not None:
            moments, gradients = offload.fetch(moments, gradients)
        updated, opt_state, metrics = optimizer.update(gradients, moments, trained, state.rng)
        updated = _with_zeros(updated, trained, kept)
        healthy = jnp.isfinite(sums["loss"]) & jnp.isfinite(metrics["grad_norm"])
        apply = (sums["weight"] > 0) & healthy

        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(apply, new, old)

        params, auxiliary = parted(tree.combine(jax.tree.map(chosen, updated, trained), frozen))
        opt_state = jax.tree.map(chosen, opt_state, moments)
        after = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state if offload is None else offload.put_back(opt_state),
            rng=state.rng,
            auxiliary=auxiliary,
        )
        # 0/0 is what a mean over nothing is: no number that could be averaged into others.
        for name in sums:
            if name not in ("weight", "trained_tokens"):
                metrics[name] = sums[name] / sums["weight"]
        metrics["trained_tokens"] = sums["trained_tokens"]
        metrics["tokens"] = _over_devices((batch.segment_ids > 0).sum(), axis)
        metrics["updated"] = apply.astype(jnp.int32)
        return after, metrics

    return step


def _bound(loss: Loss, step: jax.Array, beside: tuple[Any, ...], **options: Any) -> Loss:
    """The loss with what it gets beside parameters and batch."""
    if not beside:
        return loss

    def bound(
        config: ModelConfig, params: tree.Tree, batch: Batch, *, compute: Compute, **more: Any
    ) -> Any:
        return loss(config, params, batch, *beside, step=step, compute=compute, **options, **more)

    return bound


def _with_zeros(values: tree.Tree, params: tree.Tree, held: tree.Tree | None) -> tree.Tree:
    """`values` set to zero where a held parameter is."""
    if held is None:
        return values

    def zeroed(value: jax.Array, param: jax.Array, hold: bool) -> jax.Array:
        return jnp.where(param == 0, jnp.zeros_like(value), value) if hold else value

    return jax.tree.map(zeroed, values, params, held)


def _with_head(params: tree.Tree) -> tree.Tree:
    """Tied parameters, with the embedding as a head of its own."""
    return {**params, _HEAD: params[_EMBEDDING]}


def _without_head(gradients: tree.Tree) -> tree.Tree:
    """The gradients of tied parameters, from those of `_with_head`."""
    rest = {name: branch for name, branch in gradients.items() if name != _HEAD}
    both = jax.tree.map(jnp.add, gradients[_EMBEDDING], gradients[_HEAD])
    return {**rest, _EMBEDDING: both}


def _over_devices(values: Any, axis: str | None) -> Any:
    return values if axis is None else jax.lax.psum(values, axis)


def _make_gradient(
    config: ModelConfig,
    compute: Compute,
    loss: Loss,
    narrowed: Set[str],
    dropout: tuple[float, str | None],
) -> Any:
    """(trained, frozen, batch, key) -> (sums, gradient of the sums) of one micro-batch. narrowed:
    the arrays whose gradient is kept in bfloat16. dropout: the rate before adapters, and pmap's
    axis; key: for what is dropped out."""

    rate, axis = dropout

    def total(
        trained: tree.Tree,
        frozen: tree.Tree,
        batch: Batch,
        key: jax.Array,
        tapped: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, Metrics]:
        params, auxiliary = parted(tree.combine(trained, frozen))
        if rate:
            params = with_dropout(config, params, key, rate, axis=axis)
        if tapped:
            params = tree.map_arrays_with_path(
                lambda path, array: TappedTensor(tapped[path], array) if path in tapped else array,
                params,
            )
        more = {"auxiliary": auxiliary} if auxiliary else {}
        parts = LossSums(*loss(config, params, batch, compute=compute, **more))
        sums = _named_sums(parts, batch)
        if parts.stats is None or config.moe is None:
            return parts.loss, sums
        # As in transformers: cross entropy + coefficient * balancing loss of the batch. Weighed by
        # tokens, so that micro-batches add up.
        sums["aux_loss"] = balancing_loss(parts.stats) * parts.weight
        return parts.loss + config.moe.router_aux_loss_coef * sums["aux_loss"], sums

    def gradient(
        trained: tree.Tree, frozen: tree.Tree, batch: Batch, key: jax.Array
    ) -> tuple[Metrics, tree.Tree]:
        # A matrix whose gradient is kept in bfloat16 takes part beside the zeros that receive it.
        arrays = tree.flatten_arrays(trained)
        tapped = {path: arrays[path] for path in arrays if path in narrowed}
        given = tree.map_arrays_with_path(
            lambda path, array: jnp.zeros_like(array, jnp.bfloat16) if path in tapped else array,
            trained,
        )
        find = jax.value_and_grad(total, has_aux=True)
        (_, sums), gradients = find(given, frozen, batch, key, tapped)
        return sums, jax.tree.map(lambda g, array: g.astype(array.dtype), gradients, trained)

    return gradient


def _narrowed_matrices(config: ModelConfig) -> Set[str]:
    """Those that are multiplied in the compute dtype, which the router is not, and whose gradient
    is that of the product alone: a tied embedding's has the rows that were looked up, too."""
    return {p for p, row in weight_table(config).items() if row.role in ("matrix", "head")}


def _named_sums(parts: LossSums, batch: Batch) -> Metrics:
    tokens = batch.loss_mask.astype(jnp.float32).sum()
    return {"loss": parts.loss, **parts.means, "weight": parts.weight, "trained_tokens": tokens}


def _accumulate(
    gradient: Callable[[Batch, jax.Array], Any],
    batch: Batch,
    key: jax.Array,
    deal: tuple[int, int],
    compute: Compute,
) -> tuple[Metrics, tree.Tree]:
    """The sums over micro-batches, in float32, with one of them in memory at a time. Each has a
    key of its own.

    deal: (number of micro-batches, number of rows in succession that stay together).
    """
    parts, together = deal
    if parts == 1:
        return gradient(batch, key)

    def split(array: jax.Array) -> jax.Array:
        # Micro-batch m takes items m, m + parts, …: every device keeps the rows it has.
        apart = array.reshape(-1, parts, together, *array.shape[1:]).swapaxes(0, 1)
        apart = apart.reshape(parts, -1, *array.shape[1:])
        return constrain(apart, (None, "batch", "length"), compute.rules)

    def body(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        added = jax.tree.map(
            lambda total, new: total + new.astype(total.dtype), carry, gradient(*part)
        )
        return added, None

    micro_batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda array: array[0], micro_batches)
    sums = jax.eval_shape(gradient, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), sums)
    return jax.lax.scan(body, zeros, (micro_batches, jax.random.split(key, parts)))[0]


def make_eval_step(
    config: ModelConfig, compute: Compute, *, loss: Loss = next_token_loss
) -> Callable[..., Metrics]:
    """`eval_step(params, batch)` -> sums over the batch: loss and the loss's other means, to be
    divided by weight, and trained_tokens. With something beside the state `eval_step(params, batch,
    step, *beside)`, and the loss is asked to measure more."""

    def eval_step(params: tree.Tree, batch: Batch, step: Any = None, *beside: Any) -> Metrics:
        bound = _bound(loss, step, beside, measure=True)
        return _named_sums(LossSums(*bound(config, params, batch, compute=compute)), batch)

    return eval_step
