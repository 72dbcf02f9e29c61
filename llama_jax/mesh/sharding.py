"""From logical axes to devices: the mesh, the rules, and where each array lies.

The weight table names the logical axis of every dimension, the rules (in `Compute`) map logical to
mesh axes, and everything here follows from the two.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from qwix import QArray

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, MESH_AXES, LogicalRules, ModelConfig
from llama_jax.weights.adapted import LoraTensor, SavedTensor
from llama_jax.weights.quantized import PackedTensor, RoundedInputs
from llama_jax.weights.table import axis_sizes, weight_table
from llama_jax.weights.tensors import QatTensor, narrowed

# The axes that weights are fetched along before their product; each weight has one of them.
_FETCHED = ("embed", "expert_embed")


def make_mesh(sizes: Mapping[str, int], *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with axes data, fsdp, tensor, context, expert; missing
    ones are 1, and one may be -1: whatever is left. The product must be the number of devices."""
    devices = list(jax.devices() if devices is None else devices)
    unknown = [axis for axis in sizes if axis not in MESH_AXES]
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is unknown; axes are {', '.join(MESH_AXES)}")
    full = {axis: _size(axis, sizes.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in full.items() if size == -1]
    fixed = math.prod(size for size in full.values() if size != -1)
    if len(free) > 1:
        raise ValueError(f"mesh axes {' and '.join(free)} are both -1; only one may be")
    if free:
        if len(devices) % fixed:
            raise ValueError(
                f"mesh.{free[0]} is -1, but {fixed}, the product of the other axes, does not "
                f"divide {len(devices)} devices"
            )
        full[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(
            f"mesh {full} needs {fixed} devices, but there are {len(devices)}; change one axis, "
            f"or set it to -1"
        )
    shape = tuple(full.values())
    return Mesh(_arrange(devices, shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def _size(axis: str, size: Any) -> int:
    """Of whatever Python takes for an integer, as NumPy's are, a boolean aside."""
    try:
        number = 0 if isinstance(size, bool) else operator.index(size)
    except TypeError:
        number = 0
    if number < 1 and number != -1:
        raise ValueError(f"mesh.{axis} is {size!r}; it must be a positive integer or -1")
    return number


def _arrange(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Neighbouring mesh positions on neighbouring chips, where the platform has a topology. Of
    several slices, which only a slower network joins, each takes a part of the `data` axis."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    data, *rest = shape
    if data % len(slices):
        raise ValueError(
            f"mesh.data is {data}, but there are {len(slices)} slices: copies of the parameters go "
            f"to different slices, so it must be a multiple of {len(slices)}"
        )
    from jax.experimental import mesh_utils

    parts = [
        mesh_utils.create_device_mesh(
            (data // len(slices), *rest),
            slices[index],
            allow_split_physical_axes=True,
            contiguous_submeshes=False,
        )
        for index in sorted(slices)
    ]
    return np.concatenate(parts)


def mesh_axes(rules: LogicalRules, axis: str | None) -> tuple[str, ...]:
    """The mesh axes of a logical axis."""
    if axis is None:
        return ()
    targets = dict(rules)
    if axis not in targets:
        raise ValueError(f"the rules say nothing of {axis}; give one for each axis")
    target = targets[axis]
    return () if target is None else (target,) if isinstance(target, str) else target


def validate(config: ModelConfig, mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> None:
    """Raises ValueError naming every dimension that its mesh axes do not divide."""
    wanted = {name for axis, _ in DEFAULT_RULES for name in mesh_axes(rules, axis)}
    if unknown := sorted(wanted - set(mesh.shape)):
        raise ValueError(
            f"the mesh has no axis {', '.join(unknown)}, which the rules name; its axes are "
            f"{', '.join(mesh.shape)}; make it with make_mesh"
        )
    problems = []
    used = {axis for row in weight_table(config).values() for axis in row.axes if axis}
    for axis, size in axis_sizes(config).items():
        parts = math.prod(mesh.shape[name] for name in mesh_axes(rules, axis))
        if axis in used and size % parts:
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            below = max(n for n in divisors if n <= parts)
            above = [n for n in divisors if n > parts][:1]
            nearest = " or ".join(str(n) for n in [below, *above])
            names = " x ".join(mesh_axes(rules, axis))
            problems.append(
                f"mesh axis {names} of size {parts} does not divide {axis} = {size}; "
                f"nearest that do: {nearest}"
            )
    if problems:
        raise ValueError("; ".join(problems))


def partition_spec(
    axes: Sequence[str | None], rules: LogicalRules = DEFAULT_RULES
) -> PartitionSpec:
    """The spec of an array with these logical axes; two axes may not want the same mesh axis."""
    taken: dict[str, str] = {}
    entries = []
    for axis in axes:
        names = mesh_axes(rules, axis)
        for name in names:
            if name in taken:
                raise ValueError(
                    f"rules put both {taken[name]!r} and {axis!r} of one array on mesh axis "
                    f"{name!r}; change one of them"
                )
            taken[name] = str(axis)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def shardings(
    config: ModelConfig, params: tree.Tree, mesh: Mesh, rules: LogicalRules = DEFAULT_RULES
) -> tree.Tree:
    """A NamedSharding for every array of `params` (arrays or shape structs), in its structure."""
    validate(config, mesh, rules)
    table = weight_table(config)

    def leaf_shardings(path: str, leaf: Any) -> Any:
        return _leaf(leaf, table[path].axes, mesh, rules)

    return tree.map_with_path(leaf_shardings, params)


def _leaf(leaf: Any, axes: tuple[str | None, ...], mesh: Mesh, rules: LogicalRules) -> Any:
    def named(axes: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(axes, rules))

    def divided(part: Any) -> NamedSharding | None:
        """Of a part with fewer entries than the weight, which its mesh axes may not divide."""
        if part is None:
            return None
        kept = []
        for axis, size in zip(axes, part.shape, strict=True):
            parts = math.prod(mesh.shape[name] for name in mesh_axes(rules, axis))
            kept.append(axis if size % parts == 0 else None)
        return named(kept)

    def spread(factor: Any, axes: Sequence[str | None], dim: int) -> NamedSharding:
        """Of an adapter's factor: its long dimension also takes the mesh axes of `embed`, which
        only the other factor has; else its moments would lie on every chip whole."""
        entries = list(partition_spec(axes, rules))
        names = mesh_axes(rules, axes[dim])
        free = [name for name in mesh_axes(rules, fetched) if name not in names]
        if factor.shape[dim] % math.prod(mesh.shape[name] for name in [*names, *free]) == 0:
            entries[dim] = (*names, *free)
        return NamedSharding(mesh, PartitionSpec(*entries))

    if isinstance(leaf, LoraTensor):
        *stack, out_axis, in_axis = axes
        (fetched,) = (axis for axis in axes if axis in _FETCHED)
        return dataclasses.replace(
            leaf,
            base=_leaf(leaf.base, axes, mesh, rules),
            lora_a=spread(leaf.lora_a, [*stack, "rank", in_axis], len(stack) + 1),
            lora_b=spread(leaf.lora_b, [*stack, out_axis, "rank"], len(stack)),
            scale=named(stack),
        )
    if isinstance(leaf, SavedTensor):
        return SavedTensor(
            base=_leaf(leaf.base, axes, mesh, rules), saved=_leaf(leaf.saved, axes, mesh, rules)
        )
    if isinstance(leaf, QatTensor):
        return dataclasses.replace(leaf, weight=named(axes))
    if isinstance(leaf, RoundedInputs):
        scale = None if leaf.activation_scale is None else named(axes[:-2])
        base = _leaf(leaf.base, axes, mesh, rules)
        return dataclasses.replace(leaf, base=base, activation_scale=scale)
    if isinstance(leaf, PackedTensor):
        return jax.tree.map(divided, leaf)
    if isinstance(leaf, QArray):
        return QArray(named(axes), divided(leaf.scale), divided(leaf.zero_point), leaf.qtype)
    return named(axes[: len(leaf.shape)])


def gathered(
    leaf: Any, axes: Sequence[str | None], dtype: Any, rules: LogicalRules = DEFAULT_RULES
) -> Any:
    """A weight in `dtype`, whole along `embed` and dealt out along its other axes, on the mesh in
    force; its gradient comes back dealt out along all of them. Of an adapted weight the base and
    both factors; of a quantized one its few bits, before they become many. Without a mesh only
    rounded (see `narrowed`)."""
    *stack, out_axis, in_axis = axes
    if isinstance(leaf, LoraTensor):
        return dataclasses.replace(
            leaf,
            base=gathered(leaf.base, axes, dtype, rules),
            lora_a=gathered(leaf.lora_a, [*stack, "rank", in_axis], dtype, rules),
            lora_b=gathered(leaf.lora_b, [*stack, out_axis, "rank"], dtype, rules),
        )
    if isinstance(leaf, QatTensor):
        # In its own dtype: rounding before the rounding would make other codes than conversion.
        return dataclasses.replace(leaf, weight=gathered(leaf.weight, axes, leaf.dtype, rules))
    if isinstance(leaf, RoundedInputs):
        return dataclasses.replace(leaf, base=_gathered_parts(leaf.base, axes, rules))
    if isinstance(leaf, PackedTensor | QArray):
        return _gathered_parts(leaf, axes, rules)
    if isinstance(leaf, SavedTensor):
        return leaf
    if jax.sharding.get_abstract_mesh().empty:
        return narrowed(leaf, dtype)
    whole = partition_spec([None if axis in _FETCHED else axis for axis in axes], rules)
    return reduce_scattered(narrowed(leaf, dtype), whole, partition_spec(axes, rules))


def _gathered_parts(leaf: Any, axes: Sequence[str | None], rules: LogicalRules) -> Any:
    """The arrays of a quantized weight, which have no gradient, whole along `embed`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return leaf

    def whole(part: jax.Array) -> jax.Array:
        kept = []
        for axis, size in zip(axes, part.shape, strict=True):
            parts = math.prod(mesh.shape[name] for name in mesh_axes(rules, axis))
            kept.append(axis if axis not in _FETCHED and size % parts == 0 else None)
        return jax.lax.with_sharding_constraint(part, partition_spec(kept, rules))

    return jax.tree.map(whole, leaf)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reduce_scattered(x: jax.Array, whole: PartitionSpec, parts: PartitionSpec) -> jax.Array:
    """x as `whole`, its gradient as `parts`. A plain constraint would ask the same of its gradient:
    summed whole on every device before it is cut up, where a reduce-scatter sends half as much and
    holds a part."""
    del parts
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(x: jax.Array, whole: PartitionSpec, parts: PartitionSpec) -> Any:
    return reduce_scattered(x, whole, parts), None


def _gather_backward(
    whole: PartitionSpec, parts: PartitionSpec, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    del whole
    return (jax.lax.with_sharding_constraint(gradient, parts),)


reduce_scattered.defvjp(_gather_forward, _gather_backward)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> NamedSharding:
    """Of arrays [B, T, ...]: rows over the batch axes."""
    return NamedSharding(mesh, partition_spec(("batch", "length"), rules))


def rows_are_divided(batch: int, rules: LogicalRules = DEFAULT_RULES) -> bool:
    """Whether there is a mesh in force, and it deals out `batch` rows evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and batch % _batch_parts(mesh, rules) == 0


def batch_parts(batch: int, rules: LogicalRules = DEFAULT_RULES) -> int:
    """Into how many parts the mesh in force deals `batch` rows; 1 without a mesh."""
    if not rows_are_divided(batch, rules):
        return 1
    return _batch_parts(jax.sharding.get_abstract_mesh(), rules)


def _batch_parts(mesh: Any, rules: LogicalRules) -> int:
    return math.prod(mesh.shape[name] for name in mesh_axes(rules, "batch"))


def loss_rules(vocab_size: int, rules: LogicalRules = DEFAULT_RULES) -> LogicalRules:
    """`rules` with two more axes, `loss_batch` and `loss_vocab`, for the logits of the loss.

    The head's rows are dealt over every mesh axis its weight is spread on, as far as they divide
    the vocabulary, and tokens over the rest of the batch axes: each device then multiplies many
    tokens by a few rows, and neither the head nor its gradient ever exists whole on any of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    taken: list[str] = []
    if not mesh.empty:
        for name in dict.fromkeys((*mesh_axes(rules, "vocab"), *mesh_axes(rules, "embed"))):
            if vocab_size % math.prod(mesh.shape[each] for each in [*taken, name]) == 0:
                taken.append(name)
    rest = tuple(
        name
        for name in (*mesh_axes(rules, "batch"), *mesh_axes(rules, "length"))
        if name not in taken
    )
    return (*rules, ("loss_batch", rest), ("loss_vocab", tuple(taken)))


def check_batch(
    batch: int, length: int, mesh: Mesh | AbstractMesh, rules: LogicalRules = DEFAULT_RULES
) -> None:
    """Raises ValueError when rows or their tokens cannot be dealt out evenly."""
    names, parts = mesh_axes(rules, "batch"), _batch_parts(mesh, rules)
    if batch % parts:
        raise ValueError(
            f"batch size {batch} (rows at once: train.batch_size divided by "
            f"train.gradient_accumulation_steps, twice that for pairs) is not a multiple of "
            f"{parts}, the product of the mesh axes {' x '.join(names)}; {_nearest(batch, parts)}"
        )
    names = mesh_axes(rules, "length")
    pieces = 2 * math.prod(mesh.shape[name] for name in names)  # see mesh/sequence.py
    if pieces > 2 and length % pieces:
        raise ValueError(
            f"train.sequence_length {length} is not a multiple of {pieces}, twice the mesh axis "
            f"{' x '.join(names)}; {_nearest(length, pieces)}"
        )


def _nearest(number: int, of: int) -> str:
    """The multiples of `of` on both sides of `number`, which is none."""
    below, above = number // of * of, (number // of + 1) * of
    return f"nearest that are: {below} and {above}" if below else f"the smallest that is: {above}"


def constrain(
    x: jax.Array, axes: Sequence[str | None], rules: LogicalRules = DEFAULT_RULES
) -> jax.Array:
    """Pins an activation to its place on the mesh in force; without a mesh, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules))


def whole(values: Any) -> Any:
    """Every array whole on every device of the mesh in force, so that each of its hosts can read
    it; without a mesh, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return values
    return jax.lax.with_sharding_constraint(values, PartitionSpec())
