"""From a run config to something that can run: model, mesh, optimizer, step.

Everything is worked out on shapes first, so that a dry run allocates nothing and weights are put
straight where they will be trained.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llama_jax import tree
from llama_jax.config import Compute, LogicalRules, ModelConfig
from llama_jax.mesh.distributed import WHOLE, Share, place_rows, row_share
from llama_jax.mesh.sharding import batch_sharding, check_batch, make_mesh, replicated, shardings
from llama_jax.mesh.slices import slice_named
from llama_jax.model.losses import Batch, next_token_loss
from llama_jax.weights.lora import add_lora, check_dropout
from llama_jax.weights.qat_tree import add_qat
from llama_jax.weights.quantize import Quantization, quantize
from llama_jax.weights.select import trainable_mask, zeros_mask
from llama_jax.weights.table import abstract_params, init_params
from train.config import RunConfig
from train.data.preference import PreferenceBatch
from train.data.taught import TaughtBatch
from train.distill import DistillLoss, Teacher
from train.distill_layers import init_auxiliary
from train.distill_on_policy import OnPolicy
from train.distill_pmap import AXIS, make_pmap_step
from train.dpo import make_dpo_loss
from train.optim import Optimizer, make_optimizer, make_schedule
from train.sections.mesh import MeshSection
from train.state import Offload, TrainState, init_state, on_host, state_shardings
from train.step import Loss, make_eval_step, make_train_step

# What each use of the run's seed folds into its key.
_WEIGHTS, _ADAPTERS, _STEPS = 0, 1, 2


def open_mesh(section: MeshSection) -> Mesh:
    """The mesh over all devices, or over the first `cpu_devices` emulated ones."""
    devices = jax.devices()
    if section.slice is not None and devices[0].platform == "tpu":
        wanted = slice_named(section.slice)
        if len(devices) != wanted.num_devices:
            raise ValueError(
                f"mesh.slice is {section.slice}, which has {wanted.num_devices} devices, but there "
                f"are {len(devices)}; run on that slice, or change mesh.slice and prove it with "
                f"`llama-jax fit`"
            )
    if section.cpu_devices is not None:
        if devices[0].platform != "cpu" or len(devices) < section.cpu_devices:
            raise ValueError(
                f"mesh.cpu_devices is {section.cpu_devices}, but JAX runs with {len(devices)} "
                f"{devices[0].platform} devices; the number is settled before JAX starts, which "
                f"`llama-jax train` does"
            )
        devices = devices[: section.cpu_devices]
    return make_mesh(section.sizes(), devices=devices)


@dataclass(frozen=True)
class Setup:
    """A run made ready. `abstract` is the state as shape structs with shardings; `step` and
    `eval_step` are jitted and not compiled yet. `beside`: what they get beside the state, as shape
    structs with shardings: the parameters of a teacher, whose config is `teacher`."""

    run: RunConfig
    config: ModelConfig
    mesh: Mesh
    mask: tree.Tree
    optimizer: Optimizer
    abstract: TrainState
    step: Any
    eval_step: Any
    beside: tuple[Any, ...] = ()
    teacher: ModelConfig | None = None

    @property
    def compute(self) -> Compute:
        return self.run.compute

    @property
    def rows_per_item(self) -> int:
        """Rows of a batch that make one of `train.batch_size`: two where pairs are compared."""
        return rows_per_item(self.run)

    @property
    def micro_batch_size(self) -> int:
        return self.run.train.batch_size // self.run.train.gradient_accumulation_steps

    def batch_struct(self, items: int) -> Batch:
        """Shape structs of a batch of so many items, [items * rows_per_item, T]."""
        place = batch_sharding(self.mesh, self.compute.rules)
        shape = (items * self.rows_per_item, self.run.train.sequence_length)

        def struct(dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        ids = struct(jnp.int32)
        batch = Batch(ids, ids, struct(jnp.float32), ids, ids)
        if self.run.dpo is not None and self.run.dpo.reference == "cached":
            return PreferenceBatch(**vars(batch), reference=struct(jnp.float32))
        if self.run.distill is not None and self.run.distill.top_k is not None:
            k = self.run.distill.top_k

            def wide(width: int, dtype: Any) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct((*shape, width), dtype, sharding=place)

            return TaughtBatch(
                **vars(batch),
                teacher_ids=wide(k, jnp.int32),
                teacher_log_probs=wide(k + 1, jnp.float32),
            )
        return batch

    def share(self, rows: int) -> Share:
        """The part of a batch [rows, T] that this process brings."""
        place = batch_sharding(self.mesh, self.compute.rules)
        return row_share(place, (rows, self.run.train.sequence_length))

    def place(self, batch: Batch, share: Share = WHOLE) -> Batch:
        """The global batch, of which this process has `share`."""
        return place_rows(batch, batch_sharding(self.mesh, self.compute.rules), share)

    def num_parameters(self) -> tuple[int, int]:
        """(trained, all) values of the parameters, scales included."""
        trained, _ = tree.partition(self.abstract.params, self.mask)
        count = [
            sum(array.size for array in jax.tree.leaves(part))
            for part in (trained, self.abstract.params)
        ]
        return count[0], count[1]


def make_setup(
    run: RunConfig,
    config: ModelConfig,
    base: tree.Tree,
    mesh: Mesh,
    *,
    teacher: Teacher | None = None,
) -> Setup:
    """Works out shapes, places and functions; allocates nothing.

    base: the weights that training starts from, as shape structs. teacher: that of method distill.

    Raises ValueError for whatever does not fit the model or the mesh.
    """
    compute, rules = run.compute, run.compute.rules
    items = run.train.batch_size // run.train.gradient_accumulation_steps
    check_batch(items * rows_per_item(run), run.train.sequence_length, mesh, rules)
    _check_experts(compute, config)
    params = _abstract_params(run, config, base)
    if run.lora is not None and run.lora.lora_dropout:
        check_dropout(config, params)
    mask = trained_mask(run, config, params)
    schedule = make_schedule(
        run.schedule, peak=run.optimizer.learning_rate, total_steps=run.train.steps
    )
    taught_by = None if teacher is None else teacher.config
    auxiliary = jax.eval_shape(lambda: _init_auxiliary(run, config, taught_by))
    optimizer = make_optimizer(config, params, mask, run.optimizer, schedule, auxiliary=auxiliary)

    def first_state(params: tree.Tree) -> TrainState:
        return init_state(
            params,
            mask=mask,
            optimizer=optimizer,
            rng=run_key(run, _STEPS),
            auxiliary=_init_auxiliary(run, config, taught_by),
        )

    state = jax.eval_shape(first_state, params)
    places = state_shardings(config, state, mesh, rules)
    batch_place = batch_sharding(mesh, rules)
    loss = _make_loss(run, teacher)
    beside: tuple[Any, ...] = ()
    if teacher is not None:
        # Kept outputs come with the batch: nothing of the teacher is left to stand beside it.
        kept = run.distill is not None and run.distill.top_k is not None
        beside = ({} if kept else _placed_teacher(teacher, mesh, rules),)
    by_pmap = run.distill is not None and run.distill.step == "pmap"
    offload = None
    if run.optimizer.offload:
        working, places = places, on_host(state, places)
        offload = Offload(working.opt_state, places.opt_state)
    step = make_train_step(
        config,
        compute,
        optimizer=optimizer,
        mask=mask,
        loss=loss,
        rows_per_item=rows_per_item(run),
        accumulation_steps=run.train.gradient_accumulation_steps,
        axis=AXIS if by_pmap else None,
        held=zeros_mask(config, params) if run.model.keep_zeros else None,
        prepare=_make_prepare(run, teacher),
        offload=offload,
        lora_dropout=0.0 if run.lora is None else run.lora.lora_dropout,
    )
    beside_places = jax.tree.map(lambda struct: struct.sharding, beside)
    return Setup(
        run=run,
        config=config,
        mesh=mesh,
        mask=mask,
        optimizer=optimizer,
        abstract=jax.tree.map(_placed, state, places),
        step=make_pmap_step(step, config, mesh, num_beside=len(beside))
        if by_pmap
        else jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(places, batch_place, *beside_places),
            out_shardings=(places, replicated(mesh)),
        ),
        eval_step=jax.jit(
            make_eval_step(config, compute, loss=loss),
            in_shardings=(
                places.params,
                batch_place,
                *((replicated(mesh), *beside_places) if beside else ()),
            ),
            out_shardings=replicated(mesh),
        ),
        beside=beside,
        teacher=taught_by,
    )


def _check_experts(compute: Compute, config: ModelConfig) -> None:
    for name in () if config.moe is not None else ("moe", "moe_chunk_tokens"):
        if (value := getattr(compute, name)) != getattr(Compute, name):
            raise ValueError(
                f"compute.{name} is {value}, but the model has no experts; leave it out"
            )


def _init_auxiliary(run: RunConfig, config: ModelConfig, teacher: ModelConfig | None) -> tree.Tree:
    if run.distill is None or teacher is None:
        return {}
    return init_auxiliary(run.distill, config, teacher)


def _make_loss(run: RunConfig, teacher: Teacher | None) -> Loss:
    if run.dpo is not None:
        return make_dpo_loss(run.dpo)
    if run.distill is None:
        return next_token_loss
    assert teacher is not None, "method distill has a teacher"
    return DistillLoss(run.distill, teacher.config, teacher.num_ids, run.train.steps)


def _make_prepare(run: RunConfig, teacher: Teacher | None) -> OnPolicy | None:
    if run.distill is None or not run.distill.on_policy:
        return None
    assert teacher is not None, "method distill has a teacher"
    return OnPolicy(run.distill.on_policy, run.distill.on_policy_temperature, teacher.num_ids)


def _placed_teacher(teacher: Teacher, mesh: Mesh, rules: LogicalRules) -> tree.Tree:
    places = shardings(teacher.config, teacher.params, mesh, rules)
    return jax.tree.map(_placed, teacher.params, places)


def _placed(array: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def rows_per_item(run: RunConfig) -> int:
    return 1 if run.dpo is None else 2


def run_key(run: RunConfig, use: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(run.train.seed), use)


def trained_mask(run: RunConfig, config: ModelConfig, params: tree.Tree) -> tree.Tree:
    patterns = run.train.trainable
    return trainable_mask(config, params, patterns, method="full" if run.lora is None else "lora")


def _abstract_params(run: RunConfig, config: ModelConfig, base: tree.Tree) -> tree.Tree:
    how = quantization(run)
    if how is not None:
        base = jax.eval_shape(lambda params: _quantized(config, params, how), base)
    return jax.eval_shape(_finisher(run, config), base)


def quantization(run: RunConfig) -> Quantization | None:
    """How the base is stored; None: as it is."""
    section = run.quantization
    if section is None:
        return None
    return Quantization(
        section.scheme, section.tile, section.skip, double=section.double_quantization
    )


def _quantized(
    config: ModelConfig, params: tree.Tree, how: Quantization, *, donate: bool = False
) -> tree.Tree:
    return quantize(config, params, **vars(how), donate=donate)


def _finisher(run: RunConfig, config: ModelConfig) -> Callable[[tree.Tree], tree.Tree]:
    """Matrices wrapped for rounding, adapters added, trained arrays cast to their dtype."""

    def finish(params: tree.Tree) -> tree.Tree:
        wanted = run.compute.param_dtype
        if run.qat is not None:
            params = add_qat(config, params, **vars(run.qat))
        if run.lora is not None:
            key, dtype = run_key(run, _ADAPTERS), wanted or config.dtype
            params = add_lora(config, params, run.lora, key, param_dtype=dtype)
        if wanted is None:
            return params
        mask = trained_mask(run, config, params)
        return jax.tree.map(lambda x, keep: x.astype(wanted) if keep else x, params, mask)

    return finish


def init_random(setup: Setup) -> tree.Tree:
    """Random weights, drawn where they will lie, and quantized there."""
    run, config = setup.run, setup.config
    how = quantization(run)
    places = shardings(config, abstract_params(config), setup.mesh, setup.compute.rules)
    draw = jax.jit(lambda key: init_params(config, key), out_shardings=places)
    params = draw(run_key(run, _WEIGHTS))
    return params if how is None else _quantized(config, params, how, donate=True)


def make_state(setup: Setup, base: tree.Tree) -> TrainState:
    """The state before the first step. `base`, quantized where the run asks for it, is used up."""
    run, config = setup.run, setup.config
    places = jax.tree.map(lambda struct: struct.sharding, setup.abstract)

    def first(base: tree.Tree) -> TrainState:
        params = _finisher(run, config)(base)
        key = run_key(run, _STEPS)
        beside = _init_auxiliary(run, config, setup.teacher)
        return init_state(
            params, mask=setup.mask, optimizer=setup.optimizer, rng=key, auxiliary=beside
        )

    with warnings.catch_warnings():
        # Weights that are cast to the dtype they are trained in cannot hand on their memory.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return jax.jit(first, out_shardings=places, donate_argnums=0)(base)
