"""What one model takes on one slice, by method: weights, gradients, optimizer state, activations.

Weights and optimizer state are bytes of arrays as they lie on a chip. What the rest of a step takes
is the compiler's: its temporaries, of which the gradients of trained arrays are a part.
"""

import dataclasses
from typing import Any

import jax

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.mesh.compile import Compiled, compile_for, device_bytes
from llama_jax.mesh.sharding import make_mesh, partition_spec, shardings
from llama_jax.mesh.slices import Slice, slice_devices
from llama_jax.model.cache import init_cache
from llama_jax.model.transformer import decode
from llama_jax.weights.table import abstract_params
from train.config import RunConfig
from train.fit import Say
from train.methods import NEEDED, SECTIONS
from train.setup import make_setup
from train.start import read_shape

METHODS = ("full", "lora", "qlora")


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Bytes of one chip. activations: what is left of the compiler's temporaries; for inference
    the cache's bytes are `cache`, and there are neither gradients nor optimizer state."""

    method: str
    weights: int
    gradients: int
    optimizer: int
    cache: int
    activations: int
    total: int
    limit: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def memory_table(run: RunConfig, wanted: Slice, say: Say) -> list[MemoryRow]:
    """The model, mesh, batch and compute of `run` under full, lora and qlora training, and at
    inference: one decoding step of its rows with a cache of its sequence length."""
    rows = []
    for method in METHODS:
        rows.append(_training(with_method(run, method), wanted))
        say(f"{method}: {rows[-1].total / 2**30:.2f} GiB a chip")
    rows.append(_inference(run, wanted))
    say(f"inference: {rows[-1].total / 2**30:.2f} GiB a chip")
    return rows


def with_method(run: RunConfig, method: str) -> RunConfig:
    """The same run by another method, without what only its own method reads."""
    values = run.to_dict() | {"method": method}
    for name in SECTIONS:
        if name not in NEEDED.get(method, ()):
            values[name] = None
    values["train"]["trainable"] = None
    if method != "full":
        # Both are for matrices that are trained themselves.
        values["compute"]["gradient_dtype"] = "float32"
        values["model"]["keep_zeros"] = False
    return RunConfig.from_dict(values)


def _training(run: RunConfig, wanted: Slice) -> MemoryRow:
    config, params = read_shape(run)
    mesh = make_mesh(run.mesh.sizes(), devices=slice_devices(wanted))
    setup = make_setup(run, config, params, mesh)
    batch = setup.batch_struct(run.train.batch_size)
    with jax.set_mesh(mesh):
        lowered = setup.step.lower(setup.abstract, batch)
        held = device_bytes((setup.abstract, batch))
        compiled = compile_for(lowered, wanted, argument_bytes=held)
    trained, _ = tree.partition(setup.abstract.params, setup.mask)
    return _row(
        run.method,
        wanted,
        compiled,
        weights=device_bytes(setup.abstract.params),
        gradients=device_bytes(trained),
        optimizer=device_bytes(setup.abstract.opt_state),
        cache=0,
    )


def _inference(run: RunConfig, wanted: Slice) -> MemoryRow:
    config, _ = read_shape(with_method(run, "full"))
    mesh = make_mesh(run.mesh.sizes(), devices=slice_devices(wanted))
    rules, dtype = run.compute.rules, run.compute.dtype
    params = _placed_params(config.replace(dtype=dtype), mesh, rules)
    batch, length = run.train.batch_size, run.train.sequence_length

    def placed(struct: Any, axes: tuple[str | None, ...]) -> Any:
        place = jax.sharding.NamedSharding(mesh, partition_spec(axes, rules))
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place)

    held = run.compute.held_dtype
    empty = jax.eval_shape(lambda: init_cache(config, batch, length, dtype=held, stacked=True))

    def placed_layers(side: Any) -> Any:
        return jax.tree.map(
            lambda each: placed(each, (None, "batch", "kv_heads", None, None)), side
        )

    cache = dataclasses.replace(
        empty,
        keys=placed_layers(empty.keys),
        values=placed_layers(empty.values),
        positions=placed(empty.positions, ("batch", None)),
        lengths=placed(empty.lengths, ("batch",)),
        cursor=placed(empty.cursor, ()),
    )
    tokens = placed(jax.ShapeDtypeStruct((batch, 1), "int32"), ("batch", None))
    compute = dataclasses.replace(run.compute, attention="reference", remat="none")

    def step(params: Any, cache: Any, tokens: Any) -> Any:
        return decode(config, params, cache, tokens, compute=compute)

    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=1).lower(params, cache, tokens)
        given = device_bytes((params, cache, tokens))
        compiled = compile_for(lowered, wanted, argument_bytes=given)
    return _row(
        "inference",
        wanted,
        compiled,
        weights=device_bytes(params),
        gradients=0,
        optimizer=0,
        cache=device_bytes(cache),
    )


def _placed_params(config: ModelConfig, mesh: Any, rules: Any) -> Any:
    abstract = abstract_params(config)
    return jax.tree.map(
        lambda struct, place: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place),
        abstract,
        shardings(config, abstract, mesh, rules),
    )


def _row(method: str, wanted: Slice, compiled: Compiled, **parts: int) -> MemoryRow:
    per_chip = wanted.generation.devices_per_chip
    left = max(compiled.memory.temporaries - parts["gradients"], 0)
    return MemoryRow(
        method=method,
        **{name: size * per_chip for name, size in parts.items()},
        activations=left * per_chip,
        total=compiled.memory.total * per_chip,
        limit=wanted.hbm_bytes_per_chip,
        fits=compiled.fits,
    )
