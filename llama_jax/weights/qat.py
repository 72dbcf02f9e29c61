"""The quantized product of AQT, for training; the only file that knows AQT.

Weights are rounded to int8 or int4 with a scale for each output, activations to int8 with one for
each token, both anew in every product, and multiplied as integers. The largest magnitude maps to
the largest code, which AQT does not do by itself, so that trained weights convert to the leaves
that `quantize` makes too.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Backward = Literal["straight_through", "quantized"]

_ACTIVATION_BITS = 8


def product(x: jax.Array, weight: jax.Array, *, bits: int, backward: Backward) -> jax.Array:
    """x [T, in] times weight [out, in] -> float32 [T, out]; both float32.

    backward: `straight_through` multiplies gradients by the unrounded weights and inputs,
    `quantized` rounds the operands of both gradient products to int8 as well.
    """
    return _dot_general(bits, backward)(x, weight, (((1,), (1,)), ((), ())))


def codes(weight: jax.Array, *, bits: int) -> tuple[jax.Array, jax.Array]:
    """(int8 [out, in], float32 scale [out, 1]): what `product` makes of a weight."""
    quantizer = _config(bits, "straight_through").fwd.dg_quantizer.rhs
    quantizer.init_calibration()
    quantized, _ = quantizer.quant(weight, calibration_axes=[1])
    return quantized.qvalue.astype(jnp.int8), quantized.scale[0].astype(jnp.float32)


@functools.cache
def _dot_general(bits: int, backward: Backward) -> Callable[..., jax.Array]:
    # One object for all calls, or nothing compiled would ever be found again.
    return functools.partial(_config(bits, backward), precision=None, preferred_element_type=None)


def _config(bits: int, backward: Backward) -> Any:
    """A configuration of AQT, which using it changes."""
    with warnings.catch_warnings():
        # AQT is finished, and uses names that JAX has since given others.
        warnings.simplefilter("ignore", DeprecationWarning)
        from aqt.jax.v2 import config as aqt

    gradient_bits = 8 if backward == "quantized" else None
    cfg = aqt.config_v4(fwd_bits=8, dlhs_bits=gradient_bits, drhs_bits=gradient_bits)
    if bits != _ACTIVATION_BITS:
        aqt.set_bits(cfg, _ACTIVATION_BITS, bits, *(gradient_bits,) * 4)
        aqt.set_accumulator_dtype(cfg, jnp.int32, aqt.SKIP, aqt.SKIP)
    aqt.set_stochastic_rounding(
        cfg,
        vjp_lhs_stochastic_rounding=False,
        vjp_rhs_stochastic_rounding=False,
        implementation="jax.uniform",
    )
    for side in (cfg.fwd.dg_quantizer.lhs, cfg.fwd.dg_quantizer.rhs):
        side.numerics.preserve_max_val = True
        # Codes of four bits too: AQT would widen int8 and int4 both to int32 before the product.
        side.numerics.dtype = jnp.int8
    return cfg
