"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vlmlora.nn.variables import parameter


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike, stack: int | None = None):
        self.eps = eps
        self.weight = parameter((features,), dtype, stack=stack, init="ones")

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalise the last axis; the result has the type of `x`."""
        y = x.astype(jnp.float32)
        y = y * jnp.reciprocal(jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps))
        return y.astype(x.dtype) * self.weight.get_value().astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation to mean 0 and variance 1 in float32, then scaled and shifted, as ``torch.nn.LayerNorm``.

    https://arxiv.org/abs/1607.06450
    """

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike, stack: int | None = None):
        self.eps = eps
        self.weight = parameter((features,), dtype, stack=stack, init="ones")
        self.bias = parameter((features,), dtype, stack=stack, init="zeros")

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalise the last axis; the result has the type of `x`."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.weight.get_value().astype(jnp.float32) + self.bias.get_value().astype(jnp.float32)
        return y.astype(x.dtype)
