"""8-bit weights in the layout of bitsandbytes' LLM.int8(): int8 [out, in] and one scale a row.

A row's scale is its largest magnitude, which bitsandbytes calls SCB: ``W = q * SCB / 127``. Activations are
not quantised here. Products of few tokens run as a kernel on a Hopper GPU; `vlmlora_kernels.dispatch`
chooses. Paper: https://arxiv.org/abs/2208.07339.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from vlmlora_kernels.dispatch import FUSED, explain
from vlmlora_kernels.hopper import matvec
from vlmlora_kernels.hopper.tuning import FUSED_TOKENS
from vlmlora_kernels.lowering import few_tokens, on_cuda

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
    x: Float[Array, "*batch in"],
    values: Int8[Array, "out in"],
    scale: Float[Array, " out"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch out"]:
    """``x @ W.T`` for an int8 W, in the type of `x`.

    With up to 64 tokens the row scales are applied to the product in float32, which does not round W; with
    more, W is decoded to the type of `x` first. Only `x` has a gradient; the backward pass decodes W again:
    no decoded weight is saved for it.

    Args:
        x: activations.
        values: the weight's int8 values.
        scale: largest magnitude of each row.
        implementation: ``"fused"`` or ``"xla"`` to insist on one; see `explain`.

    Raises:
        ValueError: the scales do not fit the values, or the `implementation` cannot run this.
    """
    _check_shapes(values, scale)
    return _matmul(x, values, scale, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, values, scale, implementation):
    tokens = math.prod(x.shape[:-1])
    choice = explain(tokens, values.shape, kind="int8", dtype=x.dtype, implementation=implementation)
    if choice.implementation != FUSED:
        return _matmul_in_xla(x, values, scale)
    fused = few_tokens(matvec.EightBit(), values.shape)
    return fused(x, values, scale) if implementation else on_cuda(fused, _matmul_in_xla, x, values, scale)


def _matmul_in_xla(x, values, scale):
    if math.prod(x.shape[:-1]) > FUSED_TOKENS:
        # Decoding W costs less than writing a float32 product and reading it again for its scales.
        return jnp.matmul(x, dequantize_int8(values, scale, dtype=x.dtype).T)
    product = jnp.matmul(x, values.astype(x.dtype).T, preferred_element_type=jnp.float32)
    return (product * (scale * _RECIPROCAL_127)).astype(x.dtype)


def _matmul_fwd(x, values, scale, implementation):
    return _matmul(x, values, scale, implementation), (values, scale)


def _matmul_bwd(implementation, residuals, dy):
    values, scale = residuals
    return jnp.matmul(dy, dequantize_int8(values, scale, dtype=dy.dtype)), None, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _check_shapes(values: jax.Array, scale: jax.Array) -> None:
    if scale.shape != values.shape[:-1]:
        raise ValueError(
            f"int8 values {list(values.shape)} need one scale a row, {list(values.shape[:-1])}; "
            f"found {list(scale.shape)}"
        )
