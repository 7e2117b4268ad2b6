"""8-bit weights in the layout of bitsandbytes' LLM.int8(): int8 [out, in] and one scale a row.

A row's scale is its largest magnitude, which bitsandbytes calls SCB: ``W = q * SCB / 127``. Activations are
not quantised here. Paper: https://arxiv.org/abs/2208.07339.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

_RECIPROCAL_127 = np.float32(7.874015718698502e-3)


def quantize_int8(
    weight: Float[Array, "out in"],
) -> tuple[Int8[Array, "out in"], Float[Array, " out"]]:
    """Quantise rows to int8, as ``bitsandbytes.nn.Int8Params`` does: through float16, without outliers.

    Args:
        weight: float32, bfloat16 or float16; magnitudes above 65504 overflow in float16.

    Returns:
        int8 values and the float32 scale of each row. A row of zeros has scale 0.
    """
    # Without the barrier XLA may drop the rounding to float16 (its "excess precision").
    half = jax.lax.optimization_barrier(weight.astype(jnp.float16))
    scale = jnp.max(jnp.abs(half), axis=1).astype(jnp.float32)
    # torch divides a number by a tensor in two steps, and each rounds.
    factor = jax.lax.optimization_barrier(1.0 / jnp.where(scale == 0, 1.0, scale)) * 127.0
    return jnp.round(half.astype(jnp.float32) * factor[:, None]).astype(jnp.int8), scale


def dequantize_int8(
    values: Int8[Array, "*stack out in"], scale: Float[Array, "*stack out"], *, dtype: DTypeLike
) -> Float[Array, "*stack out in"]:
    """Decode a matrix in float32, as bitsandbytes' `int8_vectorwise_dequant`, and round once to `dtype`.

    Raises:
        ValueError: the scales do not fit the values.
    """
    _check_shapes(values, scale)
    return (values.astype(jnp.float32) * scale[..., None] * _RECIPROCAL_127).astype(dtype)


def matmul_int8(
    x: Float[Array, "*batch in"], values: Int8[Array, "out in"], scale: Float[Array, " out"]
) -> Float[Array, "*batch out"]:
    """``x @ W.T`` for an int8 W, in the type of `x`.

    The row scales are applied to the product in float32, so the forward pass does not round W. Only `x` has a
    gradient; the backward pass decodes W again: no decoded weight is saved for it.

    Raises:
        ValueError: the scales do not fit the values.
    """
    _check_shapes(values, scale)
    return _matmul(x, values, scale)


@jax.custom_vjp
def _matmul(x, values, scale):
    product = jnp.matmul(x, values.astype(x.dtype).T, preferred_element_type=jnp.float32)
    return (product * (scale * _RECIPROCAL_127)).astype(x.dtype)


def _matmul_fwd(x, values, scale):
    return _matmul(x, values, scale), (values, scale)


def _matmul_bwd(residuals, dy):
    values, scale = residuals
    return jnp.matmul(dy, dequantize_int8(values, scale, dtype=dy.dtype)), None, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _check_shapes(values: jax.Array, scale: jax.Array) -> None:
    if scale.shape != values.shape[:-1]:
        raise ValueError(
            f"int8 values {list(values.shape)} need one scale a row, {list(values.shape[:-1])}; "
            f"found {list(scale.shape)}"
        )
