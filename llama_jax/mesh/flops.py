"""Operations of a traced function, counted on its jaxpr: loops by their length, branches by the
dearest. What counts are products; everything else of a model is too little to matter."""

import math
from typing import Any

from jax.extend import core

# Products of attention kernels, in blocks that a causal mask or a window leaves out, are not done,
# nor those of rows in no group of a ragged product: the share that is, by the beginning of the
# kernel's name. `while` stands for loops whose length depends on data.
KernelShares = dict[str, float]


def count_flops(jaxpr: Any, *, kernel_shares: KernelShares | None = None) -> float:
    """Multiplications and additions of all devices together.

    jaxpr: a `ClosedJaxpr`, as `jitted.trace(...)` holds it. kernel_shares: for Pallas kernels,
    whose grid says how many blocks there are, the part of them that is computed; what is computed
    in one whose share is 0 depends on data, and is added by who asks.

    Raises ValueError for a loop whose length the jaxpr does not say.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    shares = kernel_shares or {}
    return sum(_equation(equation, shares) for equation in inner.eqns)


def _equation(equation: Any, shares: KernelShares) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        size = math.prod(left[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * size
    if name in ("ragged_dot", "ragged_dot_general"):
        return shares.get("ragged_dot", 1.0) * _ragged(equation)
    if name == "scan":
        return params["length"] * count_flops(params["jaxpr"], kernel_shares=shares)
    if name == "while":
        body = count_flops(params["body_jaxpr"], kernel_shares=shares)
        if body and shares.get("while") != 0.0:
            raise ValueError("a product lies in a loop of unknown length; use lax.scan")
        return 0.0
    if name == "cond":
        return max(count_flops(branch, kernel_shares=shares) for branch in params["branches"])
    if name == "shard_map":
        manual = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
        devices = math.prod(params["mesh"].shape[axis] for axis in manual)
        return devices * count_flops(params["jaxpr"], kernel_shares=shares)
    if name == "pallas_call":
        return _kernel(params, shares)
    return sum(
        count_flops(value, kernel_shares=shares)
        for value in params.values()
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr)
    )


def _ragged(equation: Any) -> float:
    """Every row meets one group's matrix, whatever the sizes of the groups; in the gradient of the
    matrices the rows are what is summed over."""
    rows, other = (each.aval.shape for each in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    if len(out) == 3:  # [G, k, n] from rows [m, k] and [m, n]
        return 2.0 * rows[0] * out[1] * out[2]
    del other
    return 2.0 * math.prod(rows) * out[-1]


def _kernel(params: dict[str, Any], shares: KernelShares) -> float:
    name = params["name"] or params["jaxpr"].debug_info.func_name
    share = next((value for start, value in shares.items() if name.startswith(start)), 1.0)
    if share == 0.0:
        return 0.0
    sizes = params["grid_mapping"].grid
    if not all(isinstance(size, int) for size in sizes):
        # A grid that depends on data: the kernel's authors say what all rows would take.
        return share * params["cost_estimate"].flops
    grid = math.prod(sizes)
    return share * grid * count_flops(params["jaxpr"], kernel_shares=shares)
